"""native/gpu: faults planted in the kernels are found by the CPU shim, and nvcc compiles them.

That they are right is test-gpu's business (tests/native), which the native build runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = shutil.which(os.environ.get("CXX", "c++"))
NVCC = shutil.which("nvcc")

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux") or CXX is None or shutil.which("setarch") is None,
    reason="TSan wants a C++ compiler, and a program without address randomization: setarch of Linux",
)


def run_planted(folder: Path, change, sanitizer: str | None) -> subprocess.CompletedProcess:
    """The quick case of test-gpu with its kernels changed."""
    gpu = folder / "gpu"
    shutil.copytree(ROOT / "native" / "gpu", gpu)
    source = (gpu / "prop-attn.h").read_text()
    changed = change(source)
    assert changed != source or change is same
    (gpu / "prop-attn.h").write_text(changed)
    include = [folder, ROOT / "native", ROOT / "native/core", ROOT / "native/cpu", ROOT / "tests/native"]
    flags = ["-std=c++17", "-O1", "-g", "-fno-strict-aliasing", "-DSC_ONE_CASE", *(f"-I{path}" for path in include)]
    flags += [f"-fsanitize={sanitizer}"] if sanitizer else []
    program = folder / "test-gpu"
    subprocess.run([CXX, *flags, ROOT / "tests/native/test-gpu.cpp", "-o", program, "-lpthread"], check=True)
    return subprocess.run(["setarch", "-R", program], capture_output=True, text=True, timeout=300)


def same(source: str) -> str:
    return source


def without_barrier(function: str, n: int):
    """The n-th barrier of a function taken away."""

    def change(source: str) -> str:
        at = source.index(f"void {function}(")
        for _ in range(n):
            at = source.index("sc_sync(t);", at) + 1
        return source[: at - 1] + source[at - 1 + len("sc_sync(t);") :]

    return change


def instead(old: str, new: str):
    return lambda source: source.replace(old, new, 1)


@linux
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_no_fault_is_found_where_none_was_planted(sanitizer, tmp_path):
    done = run_planted(tmp_path, same, sanitizer)
    assert done.returncode == 0, done.stdout + done.stderr


RACE, OVERFLOW, WRONG = "data race", "heap-buffer-overflow", "times the tolerance"
BARRIER = "a barrier that not all threads of the block reach"
FAULTS = {
    # what holds where it was not planted: (the change, sanitizer, what is said of it)
    "keys are there before logits": (without_barrier("prop_attn_attend", 1), "thread", RACE),
    "logits are there before shares": (without_barrier("prop_attn_attend", 2), "thread", RACE),
    "shares are there before values": (without_barrier("prop_attn_attend", 3), "thread", RACE),
    "values are used before the next tile": (without_barrier("prop_attn_attend", 4), "thread", RACE),
    "groups take turns": (without_barrier("prop_attn_attend", 5), "thread", RACE),
    "queries are there before the mean is added": (without_barrier("prop_attn_queries", 1), "thread", RACE),
    "scaled before rotated": (without_barrier("prop_attn_queries", 2), "thread", RACE),
    "blocks write to places of their own": (
        instead("e = i % (D + 2), row = r0 + r;", "e = i % (D + 2), row = r;"),
        "thread",
        RACE,
    ),
    "the tile is large enough": (
        instead("2 * SC_TILE(D) * SC_TILE_LD(D)", "2 * (SC_TILE(D) - 1) * SC_TILE_LD(D)"),
        "address",
        OVERFLOW,
    ),
    "rows end with the last": (
        instead("s.n - c < SC_TILE(D) ? s.n - c : SC_TILE(D)", "SC_TILE(D)"),
        "address",
        OVERFLOW,
    ),
    "all reach a barrier": (
        instead("if (group < N_GROUP) {", "if (t.id < 64) sc_sync(t);\n        if (group < N_GROUP) {"),
        None,
        BARRIER,
    ),
    "the mean of the keys counts": (instead("(s.bias < 0 ? 0.0f : shift[r])", "0.0f"), None, WRONG),
    "biases count": (instead("z += sc_h2f(src.bias[s.bias + c + i]);", ""), None, WRONG),
    "the mask counts": (instead("b > SC_MASKED_LO ? z + b : SC_MASKED", "z"), None, WRONG),
    "values are rotated back": (instead("if (a.v_type != SC_F16)", "if (false)"), None, WRONG),
    "sums are rescaled": (instead("factor[r] = sc_exp(before - mx);", "factor[r] = 1.0f;"), None, WRONG),
    "sinks have their own values": (instead("k + 2 * a.n_sink * D", "k + 2 * a.n_sink * D + 2"), None, WRONG),
}


@linux
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name, tmp_path):
    change, sanitizer, said = FAULTS[name]
    done = run_planted(tmp_path, change, sanitizer)
    assert done.returncode != 0 and said in done.stdout + done.stderr


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")
def test_nvcc_compiles_for_every_generation(tmp_path):
    """Registers leave room for 4 blocks of 128 threads on a multiprocessor of 65,536, and little is spilled."""
    flags = ["-std=c++17", "-O3", "-use_fast_math", f"-I{ROOT / 'native'}", "-Xptxas", "-v", "--threads", "2"]
    cards = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (75, 80, 86, 89, 90, 120)]
    source = ROOT / "native/cuda/prop-attn.cu"
    done = subprocess.run(
        [NVCC, *flags, *cards, "-DSC_COMMON_HEADS", "-c", source, "-o", tmp_path / "common.o"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    every = subprocess.run(
        [NVCC, *flags, cards[3], "-c", source, "-o", tmp_path / "all.o"], capture_output=True, text=True
    )
    assert every.returncode == 0, every.stderr
    log = done.stderr + every.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log)]
    assert len(registers) == 6 * 9 + 21 and max(registers) <= 128
    assert max(spilled) <= 64
