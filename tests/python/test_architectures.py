"""Every supported architecture, as a tiny model, through several passes."""

from __future__ import annotations

from dataclasses import replace

import llama_cpp
import numpy as np
import pytest

import tiny_models
from conftest import EXACT, SMALL, check_stats, continue_with, decode_at_once, kl, last_logits, random_tokens
from llama_semanticache import ArgumentError, StateError, _native

N_PROMPT, N_MORE = 600, 8
FULL_ATTENTION = {
    "gemma2": {1},
    "gemma3": {5},
    "lfm2": {1, 3},
    "gemma3n": {4, 9, 14, 19},
    "gemma4": {1, 3},
}  # the other layers have sliding windows, or of lfm2 a recurrent state
TOKENS = random_tokens(N_PROMPT + N_MORE)


def run(llm):
    llm.eval(TOKENS[:N_PROMPT])
    return np.array([last_logits(llm), *continue_with(llm, TOKENS[N_PROMPT:])])


@pytest.mark.parametrize("arch", tiny_models.SUPPORTED)
def test_compressed_run(arch, tiny, load):
    llm = load(tiny(arch), **SMALL)
    logits = run(llm)
    stats = llm.kv_stats()
    assert np.isfinite(logits).all() and logits.std() > 0.1
    assert stats.n_pass >= 7
    assert stats.rows_merged > 0
    assert stats.n_tokens == len(TOKENS)
    assert stats.rows_used == stats.rows_allocated
    assert stats.total_bytes < stats.full_bytes
    check_stats(llm)
    layers = {il for il, *_ in llm.kv_rows()}
    assert layers == FULL_ATTENTION.get(arch, {0, 1, 2, 3} if arch == "smollm3" else {0, 1})
    assert (stats.other_bytes > 0) == (arch in FULL_ATTENTION)

    uncompressed = run(load(tiny(arch), n_ctx=1024, n_batch=80))
    assert not np.array_equal(logits, uncompressed)
    # random weights attend to single tokens, so much is lost; but a wrong position or mask gives unrelated logits
    if arch not in FULL_ATTENTION:
        assert np.corrcoef(logits.ravel(), uncompressed.ravel())[0, 1] > 0.3


@pytest.mark.parametrize(
    "arch, n_rot",
    [
        ("llama", [16, 16]),
        ("phi3-longrope", [12, 12]),
        ("smollm3", [16, 16, 16, 0]),
        ("gemma3", [32]),
        ("gemma4", [32, 32]),
    ],
)
def test_queries_are_turned_where_rope_turned_them(arch, n_rot, tiny, load):
    llm = load(tiny(arch), **SMALL)
    ffi, lib = _native.load()
    heads = ffi.new("struct semcache_head_stats[]", len(llm.kv_rows()))
    assert lib.semcache_get_head_stats(_native.context(llm), heads, len(heads)) == len(heads)
    assert [h.n_rot for h in heads][::2] == n_rot  # two kv heads per layer


@pytest.mark.parametrize("arch", tiny_models.SUPPORTED)
def test_same_result_in_every_run_and_for_every_number_of_threads(arch, tiny, load):
    results = []
    for n_threads in (1, 1, 2):
        llm = load(tiny(arch), n_threads=n_threads, n_threads_batch=n_threads, **SMALL)
        llm.eval(TOKENS[:300])
        s = llm.kv_stats()
        results.append((last_logits(llm), llm.kv_rows(), s.rows_merged, s.rows_dropped))
        assert s.n_pass >= 3
    for logits, *rest in results[1:]:
        np.testing.assert_array_equal(logits, results[0][0])
        assert rest == list(results[0][1:])


def test_the_share_of_keys_unlike_the_others_reaches_the_passes(tiny, load):
    logits = []
    for params in ({}, {"distinct": 50}, {"distinct": 0}):
        llm = load(tiny("llama"), **SMALL, kv_params=params)
        llm.eval(TOKENS)
        logits.append(last_logits(llm))
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > 0


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no-fa", "fa"])
@pytest.mark.parametrize("arch", tiny_models.SUPPORTED)
def test_nothing_is_lost_below_capacity(arch, flash_attn, tiny, load):
    full = load(tiny(arch), n_ctx=1024, n_batch=80, logits_all=True, flash_attn=flash_attn)
    full.eval(TOKENS)
    llm = load(tiny(arch), **{**SMALL, **EXACT, "kv_ratio": 1}, logits_all=True, flash_attn=flash_attn)
    llm.eval(TOKENS)
    stats = llm.kv_stats()
    assert stats.n_pass >= 3
    assert stats.rows_merged == stats.rows_dropped == 0
    assert stats.rows_used == (stats.n_tokens - stats.n_tokens_stage) * len(llm.kv_rows())
    check_stats(llm)
    logits = llm.scores[: len(TOKENS)]
    if not flash_attn:
        assert kl(full.scores[: len(TOKENS)], logits).max() < 1e-5
        return
    # llama.cpp's own flash attention sums V in f16 on the CPU. With the sharp attention of random weights this is a KL
    # of up to 1e-4 from its f32 path; ours sums in f32, so the uncompressed f32 path is the reference.
    plain = load(tiny(arch), n_ctx=1024, n_batch=80, logits_all=True)
    plain.eval(TOKENS)
    own_noise = kl(plain.scores[: len(TOKENS)], full.scores[: len(TOKENS)]).max()
    if arch != "gemma3":  # its six layers with sliding windows use flash attention
        assert kl(plain.scores[: len(TOKENS)], logits).max() < 1e-5
    assert kl(full.scores[: len(TOKENS)], logits).max() < 2 * own_noise


@pytest.mark.parametrize("method", ["paper", "streaming"])
def test_other_methods(method, tiny, load):
    llm = load(tiny("llama"), **{**SMALL, "kv_compress": method})
    logits = run(llm)
    stats = llm.kv_stats()
    assert np.isfinite(logits).all()
    assert stats.kv_compress == method
    assert stats.n_pass >= 7
    assert stats.rows_merged + stats.rows_dropped > 0
    assert (stats.rows_merged > 0) == (method == "paper")
    check_stats(llm)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_sinks_and_window_of_a_prompt_in_one_eval_or_many(arch, tiny, load):
    """Passes depend on the tokens alone, not on the calls that brought them, where the batches end the same."""
    one, many = load(tiny(arch), **SMALL), load(tiny(arch), **SMALL)
    one.eval(TOKENS[:400])
    for i in range(0, 400, many.n_batch):
        many.eval(TOKENS[i : min(400, i + many.n_batch)])
    assert one.kv_rows() == many.kv_rows()
    np.testing.assert_array_equal(last_logits(one), last_logits(many))


@pytest.mark.parametrize("n_first", [12, 13, 16, 17])
def test_a_long_text_after_a_short_one(n_first, tiny, load):
    """Up to window and sinks there is nothing to compress yet, and still room must be found for a full batch."""
    llm = load(tiny("llama"), **SMALL)
    llm.eval(TOKENS[:n_first])
    llm.eval(TOKENS[n_first:400])
    assert llm.kv_stats().n_tokens == 400
    assert llm.kv_stats().n_pass >= 3


def test_context_larger_than_the_model_was_trained_for_uses_the_logical_size(tiny, load):
    """longrope picks its factors by n_ctx: the compressed context must do so by the logical size, not by the stage."""
    for n_ctx in (1024, 2048):  # factors change above 1024
        full = load(tiny("phi3-longrope"), n_ctx=n_ctx, n_batch=80)
        llm = load(tiny("phi3-longrope"), **{**SMALL, **EXACT, "n_ctx": n_ctx, "kv_ratio": 1})
        full.eval(TOKENS[:300])
        llm.eval(TOKENS[:300])
        assert llm.kv_stats().n_pass >= 2
        assert kl(last_logits(full), last_logits(llm)) < 1e-5


def test_layers_without_rows_of_their_own_attend_to_those_of_others_and_vote(tiny, load):
    """Of gemma4 layers 5 and 6 read layer 3: its row of the ring holds the queries of three layers."""
    llm = load(tiny("gemma4"), **SMALL)
    n_ring, n_embd_q = (SMALL["kv_stage"] - SMALL["kv_window"]) // 2 + 1, 4 * 32
    wanted = n_ring * (1 + 3) * n_embd_q // 32 * 22
    assert llm.kv_stats().query_bytes == pytest.approx(wanted, abs=64)  # tensors are padded
    run(llm)
    assert llm.kv_stats().rows_merged > 0


def test_pictures_are_refused_and_text_goes_on(tiny, load):
    """A picture comes as embeddings with four positions each."""
    llm, twin = load(tiny("qwen2vl"), **SMALL), load(tiny("qwen2vl"), **SMALL)
    for some in (llm, twin):
        some.eval(TOKENS[:200])
    n_embd, n = llama_cpp.llama_model_n_embd(llm.model), 16
    batch = llama_cpp.llama_batch_init(4 * n, n_embd, 1)
    batch.n_tokens = n
    for i in range(n):
        for axis in range(4):
            batch.pos[axis * n + i] = 200
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 0
        for e in range(n_embd):
            batch.embd[i * n_embd + e] = 0.1
    _native.clear_error()
    assert llama_cpp.llama_decode(llm.ctx, batch) != 0
    llama_cpp.llama_batch_free(batch)
    assert "expected tokens, got embeddings with 4 positions each" in str(_native.last_error())
    assert llm.kv_stats() == replace(twin.kv_stats(), pass_s=llm.kv_stats().pass_s)
    for some in (llm, twin):
        some.eval(TOKENS[200:300])
    np.testing.assert_array_equal(last_logits(llm), last_logits(twin))


def test_a_gap_in_the_positions_is_refused_and_text_goes_on(tiny, load):
    """With M-RoPE llama.cpp takes positions that leap, as they do behind a picture."""
    llm, twin = load(tiny("qwen2vl"), **SMALL), load(tiny("qwen2vl"), **SMALL)
    for some in (llm, twin):
        some.eval(TOKENS[:10])
    _native.clear_error()
    assert decode_at_once(llm, TOKENS[10:12], 2000)[0] != 0
    assert "expected tokens close behind position 9, got one at 2001; number" in str(_native.last_error())
    for some in (llm, twin):
        some.eval(TOKENS[10:300])
    np.testing.assert_array_equal(last_logits(llm), last_logits(twin))


@pytest.mark.parametrize("arch", ["llama", "gemma4"])
@pytest.mark.parametrize("n_tokens", [20, 200])
def test_attention_that_looks_ahead_is_refused_and_text_goes_on(n_tokens, arch, tiny, load):
    """llama.cpp aborts where such a batch is larger than n_ubatch."""
    llm, twin = (load(tiny(arch), **{**SMALL, "n_batch": 512}) for _ in range(2))
    for some in (llm, twin):
        some.eval(TOKENS[:100])
    llama_cpp.llama_set_causal_attn(llm.ctx, False)
    with pytest.raises(StateError, match="^batch: expected causal attention, got non-causal, .*; leave pictures out"):
        llm.eval(TOKENS[100 : 100 + n_tokens])
    llama_cpp.llama_set_causal_attn(llm.ctx, True)
    for some in (llm, twin):
        some.eval(TOKENS[100:300])
    np.testing.assert_array_equal(last_logits(llm), last_logits(twin))


def test_a_recurrent_state_goes_back_no_further_than_the_window(tiny, load, monkeypatch):
    defaults = llama_cpp.llama_context_default_params

    def with_snapshots():
        params = defaults()
        params.n_rs_seq = 4
        return params

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_context_default_params", with_snapshots)
    load(tiny("lfm2"), **{**SMALL, "kv_window": 4}).eval(TOKENS[:200])
    with pytest.raises(ArgumentError, match="^n_rs_seq: expected at most n_window = 3, got 4; lower it or raise"):
        load(tiny("lfm2"), **{**SMALL, "kv_window": 3})
