"""llama-cpp-python's own tests, unchanged, against the compressed class.

Of its 26 tests these 12 need no model of their own. The others ask for the token ids or texts of Qwen3.5 (3), for a
recurrent or hybrid model (10) or for an embedding model (1), none of which can be compressed or had without a network.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import patchctl

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TRANSFORMER = "llama_cpp_transformer_model_path-False-False"
SELECTED = [
    "test_llama.py::test_llama_cpp_version",
    "test_llama.py::test_llama_cpp_tokenization",
    f"test_llama.py::test_exact_cached_prompt_reuse_matches_fresh[{TRANSFORMER}]",
    f"test_llama.py::test_loaded_exact_cached_prompt_reuse_matches_fresh[{TRANSFORMER}]",
    f"test_llama.py::test_ram_cache_exact_prompt_hit_matches_fresh[{TRANSFORMER}]",
    f"test_llama.py::test_shorter_prompt_prefix_reuse_matches_fresh[{TRANSFORMER}]",
    "test_llama_chat_format.py",
    "test_llama_grammar.py",
    "test_llama_speculative.py",
]
N_PASSED = 12


@pytest.fixture
def upstream(tmp_path) -> Path:
    """Folder as the root of the sdist: its tests, and the vocabulary that they read."""
    source = os.environ.get("LLAMA_SEMANTICACHE_SOURCE")
    cache = ROOT / "build" / "upstream"
    tree = patchctl.fetch(cache, Path(source) if source else None)
    root = tmp_path / "llama-cpp-python"
    (root / "vendor").mkdir(parents=True)
    (root / "vendor" / "llama.cpp").symlink_to(tree.resolve(), target_is_directory=True)
    if source and Path(source).is_dir():
        tests = Path(source) / "tests" / "test_llama.py"
        if not tests.is_file():
            pytest.fail(
                f"expected llama-cpp-python's sdist in LLAMA_SEMANTICACHE_SOURCE, got {source}, which has no tests; "
                "name the sdist or leave it unset"
            )
        (root / "tests").symlink_to(tests.parent.resolve(), target_is_directory=True)
        return root
    sdist = (
        Path(source) if source else cache / f"llama_cpp_python-{patchctl.read_upstream()['llama_cpp_python']}.tar.gz"
    )
    with tarfile.open(sdist) as tar:
        for member in tar:
            if re.fullmatch(r"[^/]+/tests/\w+\.py", member.name):
                target = root / "tests" / Path(member.name).name
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    return root


def test_upstream_tests_pass_with_the_compressed_class(upstream, smollm2):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "compressed_llama",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        ".",
        "-rA",
        "-q",
    ]
    env = {**os.environ, "UPSTREAM_TEST_MODEL": smollm2}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE / "upstream"), env.get("PYTHONPATH")]))
    env.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [*command, *(f"tests/{name}" for name in SELECTED)], cwd=upstream, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(rf"^{N_PASSED} passed", done.stdout, re.M), done.stdout[-2000:]
    assert not re.search(r"skipped|deselected|xfailed", done.stdout.splitlines()[-1])
    assert done.stdout.count("PASSED tests/") == N_PASSED
