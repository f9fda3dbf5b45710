"""Runs tests of the package with a Python that has it from a wheel: `make wheel-test`.

With the kernels that the wheel chooses here, all tests that need nothing which a compiler made; with those of older
processors, what computes: a wheel holds them all, and a machine meets one of them only.
"""

from __future__ import annotations

import json
import os
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


def main(python: str) -> None:
    # not resolved: it is a link, and means its environment
    python = os.path.abspath(python)
    code = "import json, llama_semanticache as p; print(json.dumps(p.__path__[0]))"
    with tempfile.TemporaryDirectory() as elsewhere:
        installed = Path(json.loads(subprocess.check_output([python, "-c", code], cwd=elsewhere))) / "lib"
    print(f"wheel-test: {installed}, with the kernels chosen here", flush=True)
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
            shutil.copytree(installed, library)
            for file in library.glob("libggml-cpu-*"):
                if file.name != f"libggml-cpu-{kernels}.so":
                    file.unlink()
            print(f"wheel-test: on {kernels}", flush=True)
            run(python, COMPUTING, LLAMA_CPP_LIB_PATH=str(library), MTMD_CPP_LIB=str(library))


if __name__ == "__main__":
    main(*sys.argv[1:])
