"""What this machine's processor can do: the instructions that a library was compiled for, and the threads that make
sense.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import warnings
from functools import cache
from pathlib import Path

# Written by CMake beside the libraries: the names of the compiler's predefined macros, one a line.
MACROS_FILE = "compiled-for.txt"

# Macro of GCC and Clang: the feature's name in /proc/cpuinfo. Features whose instructions a compiler emits of its own
# accord, or llama.cpp uses without asking. AMX is not among them: llama.cpp asks for it.
_X86 = {
    "__SSE3__": "pni",
    "__SSSE3__": "ssse3",
    "__SSE4_1__": "sse4_1",
    "__SSE4_2__": "sse4_2",
    "__POPCNT__": "popcnt",
    "__SSE4A__": "sse4a",
    "__LZCNT__": "abm",
    "__BMI__": "bmi1",
    "__BMI2__": "bmi2",
    "__TBM__": "tbm",
    "__MOVBE__": "movbe",
    "__XOP__": "xop",
    "__AVX__": "avx",
    "__F16C__": "f16c",
    "__FMA__": "fma",
    "__FMA4__": "fma4",
    "__AVX2__": "avx2",
    "__GFNI__": "gfni",
    "__AVXVNNI__": "avx_vnni",
    "__AVXIFMA__": "avx_ifma",
    "__AVXVNNIINT8__": "avx_vnni_int8",
    "__AVXVNNIINT16__": "avx_vnni_int16",
    "__AVX512F__": "avx512f",
    "__AVX512CD__": "avx512cd",
    "__AVX512BW__": "avx512bw",
    "__AVX512DQ__": "avx512dq",
    "__AVX512VL__": "avx512vl",
    "__AVX512IFMA__": "avx512ifma",
    "__AVX512VBMI__": "avx512vbmi",
    "__AVX512VBMI2__": "avx512_vbmi2",
    "__AVX512VNNI__": "avx512_vnni",
    "__AVX512BITALG__": "avx512_bitalg",
    "__AVX512VPOPCNTDQ__": "avx512_vpopcntdq",
    "__AVX512BF16__": "avx512_bf16",
    "__AVX512FP16__": "avx512_fp16",
}

# Likewise, and the name that macOS gives it.
_ARM = {
    "__ARM_FEATURE_ATOMICS": ("atomics", "FEAT_LSE"),
    "__ARM_FEATURE_RCPC": ("lrcpc", "FEAT_LRCPC"),
    "__ARM_FEATURE_CRC32": ("crc32", "FEAT_CRC32"),
    "__ARM_FEATURE_QRDMX": ("asimdrdm", "FEAT_RDM"),
    "__ARM_FEATURE_DOTPROD": ("asimddp", "FEAT_DotProd"),
    "__ARM_FEATURE_FP16_VECTOR_ARITHMETIC": ("asimdhp", "FEAT_FP16"),
    "__ARM_FEATURE_FP16_FML": ("asimdfhm", "FEAT_FHM"),
    "__ARM_FEATURE_COMPLEX": ("fcma", "FEAT_FCMA"),
    "__ARM_FEATURE_MATMUL_INT8": ("i8mm", "FEAT_I8MM"),
    "__ARM_FEATURE_BF16": ("bf16", "FEAT_BF16"),
    "__ARM_FEATURE_SVE": ("sve", None),
    "__ARM_FEATURE_SVE2": ("sve2", None),
    "__ARM_FEATURE_SME": ("sme", "FEAT_SME"),
}

_CPUINFO = Path("/proc/cpuinfo")


def missing_instructions(library: Path) -> list[str]:
    """Names of what the libraries in a folder were compiled for and this processor does not have.

    Empty where nobody can say: the folder has no list, or the system does not tell its processor's features.
    """
    try:
        macros = set((library / MACROS_FILE).read_text(encoding="ascii").split())
    except OSError:
        return []
    if sys.platform == "darwin":
        names = (
            [name for macro, (_, name) in _ARM.items() if macro in macros and name]
            if platform.machine() == "arm64"
            else []
        )
        return [name for name in names if not _sysctl(f"hw.optional.arm.{name}")]
    wanted = [name for macro, name in _X86.items() if macro in macros] + [
        name for macro, (name, _) in _ARM.items() if macro in macros
    ]
    features = _linux_features()
    return [name for name in wanted if name not in features] if features else []


def _linux_features() -> set[str]:
    """Features of the first processor, of all on the machine."""
    try:
        with open(_CPUINFO, encoding="ascii", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    return set(value.split())
    except OSError:
        pass
    return set()


def _sysctl(name: str) -> int:
    """An integer that macOS knows by name; 0 if it does not."""
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return value.value


def n_cpu() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache  # once for a number of threads: calibrating and loading ask alike
def warn_of_threads(n_threads: int, stacklevel: int = 2) -> None:
    """Warn if there are more threads than processors: ggml's threads spin while they wait for one another."""
    if n_threads > n_cpu():
        warnings.warn(
            f"threads: expected at most {n_cpu()}, as many as the processors that this process may use, got "
            f"{n_threads}, which will wait for one another; lower n_threads and n_threads_batch",
            stacklevel=stacklevel,
        )
