"""tools/: what is run on a card, tried without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import built_by_make, random_tokens
from llama_semanticache import memory, models

TOOLS = Path(__file__).parents[2] / "tools"


def run(*command, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], env={**os.environ, **env}, capture_output=True, text=True, timeout=600
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the card's fibers and its memory are Linux'")
def test_gpu_check_on_the_card(tmp_path):
    card = built_by_make("LLAMA_SEMANTICACHE_CARD", "the card of tests/card")
    words = ("--part", "model", "--backend", f"{card}:card_reg", "--out", tmp_path)
    done = run(TOOLS / "gpu-check", *words, GPU_CHECK_ARCHS="qwen2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passes, " in done.stdout and done.stdout.count("  ok: ") == 17 and "WRONG" not in done.stdout
    assert json.loads((tmp_path / "gpu-check.json").read_text()) == {"model": "ok"}


def test_gpu_check_fails_where_there_is_no_card(tmp_path):
    """A test-op that finds no device is no success, and neither are the CPU's own results."""
    build = Path(built_by_make("LLAMA_SEMANTICACHE_CARD", "the card of tests/card")).parent
    words = ("--part", "op", "--part", "model", "--build", build, "--out", tmp_path)
    done = run(TOOLS / "gpu-check", *words, GPU_CHECK_ARCHS="llama")
    assert done.returncode == 1 and "op: WRONG" in done.stdout and "model: WRONG" in done.stdout
    assert "0 results of devices" in done.stdout and "  WRONG: llama.cpp finds a card" in done.stdout
    assert done.stdout.count("  WRONG: passes on the card") == 2 and done.stdout.count("  WRONG: ") == 3


def test_gpu_check_fails_where_nothing_was_found_out(tmp_path):
    """What hangs is not right."""
    done = run(TOOLS / "gpu-check", "--part", "model", "--limit", "0", "--out", tmp_path)
    assert done.returncode == 1 and "model: nothing found out" in done.stdout


def test_a_random_model_has_its_shape_and_runs(tmp_path, load):
    path = tmp_path / "tiny.gguf"
    done = run(TOOLS / "random_model.py", "tiny", path)
    assert done.returncode == 0, done.stderr
    shape = models.open_model(str(path)).shape
    assert (len(shape.layers), shape.n_head_kv) == (2, 4)
    llm = load(path, n_ctx=256, n_gpu_layers=0, logits_all=True)
    llm.eval(random_tokens(20))
    assert np.isfinite(llm.scores[:20]).all() and llm.scores[:20].std() > 0
    assert memory.estimate(shape, 256, "f16").kv_bytes == llm.kv_stats().total_bytes
