"""Attention over cores and stage against what it must equal. (Against explicit duplicates: tests/native.)"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import tiny_models
from conftest import EXACT, PASSES, check_stats, continue_with, kl, last_logits, random_tokens, text_tokens


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no-fa", "fa"])
def test_ratio_1_is_full_attention_on_a_real_model(flash_attn, smollm2_f32, load):
    """At every position, through four passes. In f32: quantized weights amplify float noise (see conftest)."""
    n = 320
    full = load(smollm2_f32, n_ctx=512, n_batch=64, logits_all=True, flash_attn=flash_attn)
    tokens = text_tokens(full, n)
    full.eval(tokens)
    llm = load(
        smollm2_f32,
        n_ctx=512,
        logits_all=True,
        flash_attn=flash_attn,
        kv_compress="semanticache",
        kv_ratio=1,
        **EXACT,
        kv_stage=100,
        kv_window=32,  # batches of 64: below that upstream adds values up in f16
    )
    llm.eval(tokens)
    stats = llm.kv_stats()
    assert stats.n_pass >= 3
    assert stats.rows_merged == stats.rows_dropped == 0
    check_stats(llm)
    got = np.array([kl(full.scores[i : i + 32], llm.scores[i : i + 32]).max() for i in range(0, n, 32)])
    assert got.max() < 1e-5
    assert (full.scores[: n - 1].argmax(-1) == llm.scores[: n - 1].argmax(-1)).all()


@pytest.mark.parametrize("method", ["streaming", "paper", "keydiff", "h2o"])
def test_methods_with_room_for_the_whole_text_are_full_attention(method, tiny, load):
    tokens = random_tokens(400)
    full = load(tiny("qwen3"), n_ctx=1024, n_batch=80, logits_all=True)
    llm = load(
        tiny("qwen3"), n_ctx=1024, **{**PASSES, **EXACT, "kv_compress": method, "kv_ratio": 0.5}, logits_all=True
    )
    for some in (full, llm):
        some.eval(tokens)
    stats = llm.kv_stats()
    assert stats.n_pass >= 3 and stats.rows_merged == stats.rows_dropped == 0
    assert kl(full.scores[:400], llm.scores[:400]).max() < 1e-5
    asks = method in ("semanticache", "snapkv", "tova", "h2o")
    assert (stats.query_bytes > 5_000) == asks, "a method that asks no queries keeps none"


def test_streaming_is_attention_to_the_sinks_and_the_newest_tokens(tmp_path, load):
    """With one layer K and V depend on token and position alone, so the lost tokens can be left out by hand."""
    path = tiny_models.write_tiny(tmp_path / "one.gguf", "llama", n_layer=1)
    n_ctx, ratio, n_sink = 512, 0.25, 4
    rows = int(n_ctx * ratio)  # per head, sinks included
    llm = load(path, n_ctx=n_ctx, **{**PASSES, "kv_compress": "streaming", "kv_ratio": ratio}, kv_sink=n_sink)
    tokens = random_tokens(460)
    llm.eval(tokens)
    stats = llm.kv_stats()
    assert stats.rows_dropped > 0
    assert all(allocated == used == rows for *_, allocated, used in llm.kv_rows())
    first = stats.n_tokens - stats.n_tokens_stage - (rows - n_sink)  # oldest token kept besides the sinks

    full = load(path, n_ctx=n_ctx, n_batch=80)
    full.eval(tokens)
    assert kl(last_logits(full), last_logits(llm)) > 1e-4  # the lost tokens do matter
    assert full._ctx.kv_cache_seq_rm(0, n_sink, first)
    tokens = random_tokens(8, seed=1)
    assert kl(continue_with(full, tokens), continue_with(llm, tokens)).max() < 1e-5


def test_kv_bytes_at_a_quarter(smollm2, load):
    """The allocation, by llama.cpp's own breakdown: a quarter of the rows in 18 of 64 bytes, the stage in 34, the query
    ring and 2% for the rest.
    """
    n_ctx, n_stage, n_window = 8192, 384, 256
    full = load(smollm2, n_ctx=n_ctx).kv_stats().total_bytes
    stats = load(smollm2, n_ctx=n_ctx, kv_compress="semanticache", kv_ratio=0.25, kv_profile=None).kv_stats()
    per_token = 30 * 3 * 64 * 2 * 2
    assert full == stats.full_bytes == per_token * n_ctx
    assert stats.stage_bytes == per_token * n_stage * 34 // 64
    query_bytes = 30 * (9 * 64 // 32) * 22 * ((n_stage - n_window) // 2 + 1)  # q5_0, of every second token
    assert query_bytes <= stats.query_bytes < query_bytes + 30 * 128  # aligned
    assert stats.rows_allocated == 30 * 3 * n_ctx // 4
    assert stats.total_bytes <= 0.25 * full * 18 / 64 + stats.stage_bytes + stats.query_bytes + 0.02 * full


RESIDENT = """
import sys, json
from llama_semanticache import Llama
sys.path.insert(0, sys.argv[2])
from conftest import random_tokens
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
options = json.loads(sys.argv[3])
Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False).close()
before = resident()
options.update(n_ctx=4096, n_batch=128, n_threads=1, n_threads_batch=1, verbose=False, flash_attn=True)
llm = Llama(sys.argv[1], **options)
llm.eval(random_tokens(1400))
stats = llm.kv_stats()
grown = resident() - before
print("RESULT", json.dumps([grown, stats.total_bytes, stats.full_bytes, stats.rows_used, stats.rows_allocated]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_resident_size_falls_with_the_kv_bytes(tmp_path):
    """A model of wide heads, so that the cache (128 MiB uncompressed) outweighs all else; every row is written."""
    import json

    path = tiny_models.write_tiny(tmp_path / "wide.gguf", "llama", n_head=8, n_head_kv=8, n_embd_head=512)
    results = []
    for options in ({}, dict(kv_compress="semanticache", kv_stage=256, kv_window=64, kv_ratio=0.25, kv_profile=None)):
        command = [sys.executable, "-c", RESIDENT, str(path), os.path.dirname(__file__), json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.split("RESULT")[1]))
    (full_rss, full_bytes, *_), (rss, kv_bytes, same, used, allocated) = results
    assert full_bytes == same == 2 * 2 * 2 * 8 * 512 * 4096
    assert used == allocated
    saved = full_bytes - kv_bytes
    assert saved > 0.6 * full_bytes
    # 15%: scratch of the passes and graphs
    assert abs((full_rss - rss) - saved) < 0.15 * full_bytes, (full_rss, rss, full_bytes, kv_bytes)
