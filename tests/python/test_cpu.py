"""A library for another processor is found out before it is loaded; more threads than processors are told once."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from conftest import SMALL
from llama_semanticache import Llama, _cpu, _native

LIB = Path(_native.library_folder())

X86_FLAGS = "fpu sse sse2 pni ssse3 sse4_1 sse4_2 popcnt avx avx2 fma f16c bmi1 bmi2 abm movbe"
CPUINFO = f"processor\t: 0\nmodel name\t: A\nflags\t\t: {X86_FLAGS}\n\nprocessor\t: 1\nflags\t\t: {X86_FLAGS} avx512f\n"
ARM_CPUINFO = "processor\t: 0\nFeatures\t: fp asimd atomics asimdhp asimdrdm asimddp\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(cpuinfo, macros) -> what libraries that were compiled with these macros miss on such a machine."""

    def missing(cpuinfo: str, macros: str) -> list[str]:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
        (tmp_path / _cpu.MACROS_FILE).write_text("\n".join(macros.split()) + "\n")
        monkeypatch.setattr(_cpu, "_CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(sys, "platform", "linux")
        return _cpu.missing_instructions(tmp_path)

    return missing


@pytest.mark.parametrize(
    ("cpuinfo", "macros", "missing"),
    [
        (CPUINFO, "__AVX2__ __FMA__ __BMI2__ __SSE4_2__ __OPTIMIZE__ __x86_64__", []),
        (CPUINFO, "__AVX2__ __AVX512F__ __AVX512VNNI__", ["avx512f", "avx512_vnni"]),
        (CPUINFO, "__AVX2__ __AMX_TILE__ __AMX_INT8__ __SHA__", []),  # asked for when it runs, or never used
        (ARM_CPUINFO, "__ARM_FEATURE_ATOMICS __ARM_FEATURE_DOTPROD __ARM_FEATURE_FP16_VECTOR_ARITHMETIC", []),
        (ARM_CPUINFO, "__ARM_FEATURE_DOTPROD __ARM_FEATURE_SVE __ARM_FEATURE_MATMUL_INT8", ["i8mm", "sve"]),
        ("processor\t: 0\n", "__AVX2__ __AVX512F__", []),  # it does not say
    ],
)
def test_what_a_processor_lacks(cpuinfo, macros, missing, machine):
    assert machine(cpuinfo, macros) == missing


def test_apple_silicon(tmp_path, monkeypatch):
    (tmp_path / _cpu.MACROS_FILE).write_text("__ARM_FEATURE_DOTPROD\n__ARM_FEATURE_MATMUL_INT8\n__ARM_FEATURE_SVE\n")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(_cpu.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(_cpu, "_sysctl", lambda name: name == "hw.optional.arm.FEAT_DotProd")
    assert _cpu.missing_instructions(tmp_path) == ["FEAT_I8MM"]


def test_no_list_and_no_cpuinfo(tmp_path, monkeypatch):
    assert _cpu.missing_instructions(tmp_path) == []
    (tmp_path / _cpu.MACROS_FILE).write_text("__AVX512F__\n")
    monkeypatch.setattr(_cpu, "_CPUINFO", tmp_path / "none")
    assert _cpu.missing_instructions(tmp_path) == []


def test_the_build_says_what_it_was_compiled_for():
    macros = (LIB / _cpu.MACROS_FILE).read_text().split()
    assert len(set(macros) & {*_cpu._X86, *_cpu._ARM}) >= 1  # SSE3 at the least, or something that 64-bit ARM may have
    assert _cpu.missing_instructions(LIB) == []


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="other systems name their processor's features in their own way"
)
def test_a_library_for_another_processor_is_not_loaded(tiny, tmp_path):
    """No processor has all instructions there are: AMD's old and Intel's new ones exclude each other."""
    for file in LIB.iterdir():
        if file.name != _cpu.MACROS_FILE:
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / _cpu.MACROS_FILE).write_text("\n".join([*_cpu._X86, *_cpu._ARM]))
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(tmp_path)}
    for command in (
        ["-c", "import llama_semanticache; llama_semanticache.Llama"],
        ["-m", "llama_semanticache", "run", tiny("llama"), "--prompt", "x"],
    ):
        done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
        assert done.returncode == 1, done
        assert "expected a processor with" in done.stderr and "build it again on this machine" in done.stderr, (
            done.stderr
        )


def test_more_threads_than_processors_draw_one_warning(tiny):
    many = _cpu.n_cpu() + 1
    _cpu.warn_of_threads.cache_clear()
    with pytest.warns(UserWarning) as told:
        for _ in range(2):
            Llama(tiny("llama"), **SMALL, n_threads=many, n_threads_batch=many, verbose=False).close()
    (warning,) = [w for w in told if "threads" in str(w.message)]
    assert f"expected at most {_cpu.n_cpu()}," in str(warning.message) and f"got {many}" in str(warning.message)
    assert Path(warning.filename) == Path(__file__)


@pytest.mark.parametrize("options", [{}, {"n_threads": 1, "n_threads_batch": None}])
def test_as_many_threads_as_processors_draw_none(options, tiny):
    _cpu.warn_of_threads.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="threads")
        Llama(tiny("llama"), **SMALL, verbose=False, **options).close()
