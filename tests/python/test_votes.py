"""A window larger than the ring of queries: passes come before the stage overflows, and a token is judged by
several.
"""

from __future__ import annotations

import numpy as np
import pytest

from conftest import EXACT, check_stats, continue_with, kl, last_logits, random_tokens

TOKENS, MORE = random_tokens(400), random_tokens(150, seed=1)
N_RING, N_BATCH = 64, 60
KV = dict(kv_compress="semanticache", kv_ratio=0.25, kv_stage=192, kv_window=128, kv_profile=None)
WIDE = dict(n_ctx=1024, n_batch=N_BATCH, **KV)


@pytest.fixture
def beside_stock(tiny, load):
    """beside_stock(f) does f(object) to a compressed cache that keeps every row, and to llama.cpp's: their next logits
    must agree.
    """

    def check(f):
        llm = load(tiny("llama"), **{**WIDE, **EXACT, "kv_ratio": 1}, flash_attn=False)
        full = load(tiny("llama"), n_ctx=1024, n_batch=N_BATCH, flash_attn=False)
        for some in (llm, full):
            f(some)
        assert llm.kv_stats().rows_used > 0 == llm.kv_stats().rows_dropped
        assert kl(continue_with(full, MORE), continue_with(llm, MORE)).max() < 1e-5

    return check


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_until_the_stage_overflows_passes_only_take_votes(arch, flash_attn, tiny, load):
    llm = load(tiny(arch), **WIDE, logits_all=True, flash_attn=flash_attn)
    full = load(tiny(arch), n_ctx=1024, n_batch=N_BATCH, logits_all=True, flash_attn=flash_attn)
    assert llm.n_batch == N_BATCH
    for some in (llm, full):
        some.eval(TOKENS[:180])
    stats = llm.kv_stats()
    assert (stats.n_pass, stats.n_tokens_stage, stats.rows_used) == (2, 180, 0)
    np.testing.assert_array_equal(llm.scores[:180], full.scores[:180])
    llm.eval(TOKENS[180:])
    assert llm.kv_stats().rows_used > 0
    check_stats(llm)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_nothing_is_lost_with_every_row_kept(arch, tiny, load):
    llm = load(tiny(arch), **{**WIDE, **EXACT, "kv_ratio": 1}, flash_attn=False)
    full = load(tiny(arch), n_ctx=1024, n_batch=N_BATCH, flash_attn=False)
    for some in (llm, full):
        some.eval(TOKENS)
    stats = llm.kv_stats()
    assert stats.n_pass >= 6 and stats.rows_merged == stats.rows_dropped == 0
    assert kl(continue_with(full, MORE), continue_with(llm, MORE)).max() < 1e-5


def test_tokens_one_by_one_pass_when_the_ring_is_full(tiny, load):
    llm = load(tiny("llama"), **WIDE)
    llm.eval(TOKENS[:1])
    passes = []
    for n in range(1, 300):
        before = llm.kv_stats().n_pass
        llm.eval(TOKENS[n : n + 1])
        if llm.kv_stats().n_pass > before:
            passes.append(n)
    assert passes == [64, 128, 192, 256]
    assert llm.kv_stats().n_tokens_stage == 128 + 300 - 256


@pytest.mark.parametrize("n_tokens", [50, 51, 130, 181, 400])
def test_a_state_carries_votes_and_queries(n_tokens, tiny, load):
    """Whoever restores it goes on alike, through passes that count the votes."""
    llm, other = load(tiny("llama"), **WIDE), load(tiny("llama"), **WIDE)
    llm.eval(TOKENS[:n_tokens])
    state = llm.save_state()
    other.eval(MORE)  # leaves votes and queries of its own behind
    ends = []
    for some in (llm, other):
        some.load_state(state)
        assert some.save_state().llama_state == state.llama_state
        some.eval(MORE + TOKENS)
        ends.append((some.kv_rows(), last_logits(some)))
        check_stats(some)
    assert ends[0][0] == ends[1][0]
    np.testing.assert_array_equal(ends[0][1], ends[1][1])


def test_a_state_without_its_votes_would_end_otherwise(tiny, load):
    """The test above can fail: the same stage whose tokens were never asked about keeps other rows."""
    llm, twin = load(tiny("llama"), **WIDE), load(tiny("llama"), **WIDE)
    llm.eval(TOKENS[:300])
    for i in range(0, 300, 25):  # passes at other places
        twin.eval(TOKENS[i : i + 25])
    for some in (llm, twin):
        some.eval(MORE)
    assert np.abs(last_logits(llm) - last_logits(twin)).max() > 1e-3


@pytest.mark.parametrize("cut", [290, 310, 350])
def test_a_cut_in_the_stage_before_the_last_pass(cut, tiny, load, beside_stock):
    """Tokens that have voted are taken away, others come in their place and vote anew."""

    def cut_and_go_on(llm):
        llm.eval(TOKENS)
        assert llm._ctx.kv_cache_seq_rm(0, cut, -1)
        llm.n_tokens = cut
        llm.eval(MORE + TOKENS[:200])

    llm = load(tiny("llama"), **WIDE)
    cut_and_go_on(llm)
    assert llm.kv_stats().n_tokens == cut + 350
    check_stats(llm)
    beside_stock(cut_and_go_on)


def test_tokens_between_others_can_go(tiny, load, beside_stock):
    """Behind the gap stay tokens that have voted and tokens that have not, and both as often as without it."""
    llm = load(tiny("llama"), **WIDE)
    llm.eval(TOKENS[:385])
    stats = llm.kv_stats()
    n_past = stats.n_tokens - stats.n_tokens_stage
    assert n_past == 232 and stats.n_pass == 6  # after 360 tokens
    assert llm._ctx.kv_cache_seq_rm(0, 300, 370)
    assert llm.kv_stats().n_tokens_stage == stats.n_tokens_stage - 70
    n = 385
    while llm.kv_stats().n_pass == 6:
        llm.eval(TOKENS[:1])
        n += 1
    assert n == 360 + 64 + 1  # as much room in the ring as if no token had gone

    def leave_a_gap(llm):
        llm.eval(TOKENS[:385])
        assert llm._ctx.kv_cache_seq_rm(0, 300, 370)

    beside_stock(leave_a_gap)


def test_a_cut_behind_a_gap(tiny, load):
    """The text then ends before what the last pass had asked: what comes there must find room, and a state must be
    whole.
    """
    llm = load(tiny("llama"), **WIDE)
    llm.eval(TOKENS[:385])  # 360 of them were asked
    assert llm._ctx.kv_cache_seq_rm(0, 300, 370) and llm._ctx.kv_cache_seq_rm(0, 370, -1)
    llm.n_tokens = 300
    assert llm.kv_stats().n_tokens == 300
    llm.load_state(llm.save_state())
    llm._batch.set_batch(batch=MORE[:10], n_past=300, logits_all=False)
    llm._ctx.decode(llm._batch)
    llm.n_tokens = 310
    assert continue_with(llm, MORE[10:]).shape[0] == len(MORE) - 10 and llm.kv_stats().n_pass > 6
    check_stats(llm)


@pytest.mark.parametrize("method", ["semanticache", "snapkv", "tova", "h2o"])
def test_a_pass_in_which_nobody_votes(method, tiny, load):
    """Every second token votes, and just those are gone."""
    llm = load(tiny("llama"), **{**WIDE, "kv_compress": method})
    llm.eval(TOKENS[:366])
    n_pass, asked = llm.kv_stats().n_pass, 360  # six batches of 60
    for p in range(asked, 366, 2):
        assert llm._ctx.kv_cache_seq_rm(0, p, p + 1)
    llm.eval(MORE[:60])
    assert llm.kv_stats().n_pass == n_pass + 1
    llm.eval(MORE[60:])
    assert np.isfinite(continue_with(llm, TOKENS[:100])).all()


def test_a_text_may_begin_anywhere(beside_stock):
    def begin_at_300(llm):
        for start in range(0, 240, 60):
            llm._batch.set_batch(batch=TOKENS[start : start + 60], n_past=300 + start, logits_all=False)
            llm._ctx.decode(llm._batch)
        llm.n_tokens = 540

    beside_stock(begin_at_300)
