"""What is in examples/ runs, where the packages that it shows are installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from llama_semanticache import models

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PACKAGES = {"langchain": "langchain_community", "llama_index": "llama_index", "guidance": "guidance"}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=EXAMPLES)


@pytest.mark.fetch
@pytest.mark.parametrize("name", PACKAGES)
def test_frameworks_answer_with_a_compressed_cache(name):
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    model = models.fetch(models.default_name(), progress=False)
    done = run(f"import frameworks; print(repr(frameworks.{name}({str(model)!r})))")
    assert done.returncode == 0, done.stderr
    stats, answer = done.stdout.strip().splitlines()
    assert "KVStats(kv_compress='semanticache', n_ctx=1024" in stats and len(answer) > 20


@pytest.mark.fetch
def test_a_wrong_argument_is_told_through_langchain():
    if importlib.util.find_spec("langchain_community") is None:
        pytest.skip("langchain_community is not installed")
    model = models.fetch(models.default_name(), progress=False)
    done = run(
        "import llama_cpp, llama_semanticache; llama_cpp.Llama = llama_semanticache.Llama\n"
        "from langchain_community.llms import LlamaCpp\n"
        f"LlamaCpp(model_path={str(model)!r}, model_kwargs={{'kv_compress': 'semanticache', 'ratio': 0.2}})"
    )
    assert done.returncode == 1 and "ratio (did you mean kv_ratio?)" in done.stderr
