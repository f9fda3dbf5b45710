"""Rows and stage of all types: what they take, what they lose, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import tiny_models
from conftest import EXACT, SMALL, check_stats, continue_with, kl, last_logits, random_tokens
from llama_semanticache import ArgumentError, StateError, UnsupportedModelError

TOKENS, MORE = random_tokens(500), random_tokens(150, seed=1)
BLOCK_BYTES = {"f16": 64, "q8_0": 34, "q5_0": 22, "q4_0": 18, "iq4_nl": 18}  # of 32 values


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Heads of 64 values: whole blocks, and more than one."""
    return str(tiny_models.write_tiny(tmp_path_factory.mktemp("wide") / "m.gguf", "llama", n_embd_head=64))


def with_types(load, path, type_k, type_v, **options):
    llm = load(path, **{**SMALL, "kv_ratio": 1, **options}, kv_type_k=type_k, kv_type_v=type_v)
    llm.eval(TOKENS)
    check_stats(llm)
    return llm


@pytest.mark.parametrize("flash_attn", [False, True])
def test_finer_rows_lose_less(wide, load, flash_attn):
    """Every row kept, so that its type is all that is lost."""
    full = load(wide, n_ctx=1024, n_batch=80)
    full.eval(TOKENS)
    expected = continue_with(full, MORE)
    loss = {}
    for kind in BLOCK_BYTES:
        llm = with_types(load, wide, kind, kind, flash_attn=flash_attn, kv_type_stage="f16")
        assert llm.kv_stats().rows_merged == 0
        loss[kind] = kl(expected, continue_with(llm, MORE)).mean()
    assert loss["f16"] < 1e-5
    assert 1e-8 < loss["q8_0"] < loss["q5_0"] < loss["iq4_nl"] < loss["q4_0"] < 0.05


def test_a_stage_in_8_bits_loses_little(wide, load):
    """Before any row is compressed, and with all rows kept."""
    full = load(wide, n_ctx=1024, n_batch=80)
    llm = load(wide, **{**SMALL, **EXACT, "kv_ratio": 1, "kv_type_stage": "q8_0"})
    for n_read in (60, 500):
        for some in (full, llm):
            some.reset()
            some.eval(TOKENS[:n_read])
        assert (llm.kv_stats().rows_used > 0) == (n_read > SMALL["kv_stage"])
        assert 1e-9 < kl(continue_with(full, MORE), continue_with(llm, MORE)).mean() < 1e-3


def test_keys_that_share_a_large_part_lose_no_more(wide, load, tmp_path):
    """A bias on the keys, as Qwen2.5 has it, is what frames are for: 30 times as large as the rest, it would leave
    nothing of 4 bits.
    """
    path = str(tiny_models.write_tiny(tmp_path / "b.gguf", "qwen2", n_embd=256, k_bias=30.0))
    full = load(path, n_ctx=1024, n_batch=80)
    full.eval(TOKENS)
    expected = continue_with(full, MORE)
    llm = with_types(load, path, "iq4_nl", "f16", kv_type_stage="f16")
    assert kl(expected, continue_with(llm, MORE)).mean() < 0.03


def test_auto(wide, tiny, load):
    types = ("kv_type_k", "kv_type_v", "kv_type_stage")
    for path, same in ((wide, ("iq4_nl", "iq4_nl", "q8_0")), (tiny("llama"), ("f16",) * 3)):
        auto, named = (load(path, **SMALL, **kinds).kv_stats() for kinds in ({}, dict(zip(types, same, strict=True))))
        assert auto.core_bytes == named.core_bytes > 0 and auto.stage_bytes == named.stage_bytes > 0
    small, large = (load(wide, **SMALL, **kinds).kv_stats() for kinds in ({}, EXACT))
    assert small.core_bytes < large.core_bytes / 2.5 and small.stage_bytes == large.stage_bytes * 34 // 64
    assert load(wide, **SMALL, flash_attn=False).kv_stats().stage_bytes == large.stage_bytes


@pytest.mark.parametrize("type_k", BLOCK_BYTES)
@pytest.mark.parametrize("type_v", BLOCK_BYTES)
def test_bytes(wide, load, type_k, type_v):
    llm = with_types(load, wide, type_k, type_v, kv_ratio=0.25)
    stats = llm.kv_stats()
    assert stats.rows_merged > 0
    rows = 1024 // 4 * 2  # of a layer's two kv heads
    # K, V, bias, 16 bytes of row counts, frames and sinks, each padded by the buffer to 32 bytes at most
    exact = 2 * (rows * (2 * BLOCK_BYTES[type_k] + 2 * BLOCK_BYTES[type_v] + 2) + 16 + 2 * 2 * (2 * 64 + 4 * 2 * 64))
    assert exact <= stats.core_bytes < exact + 2 * 5 * 32
    assert stats.other_bytes == 0
    assert np.isfinite(continue_with(llm, MORE)).all()


def test_a_state_goes_into_the_same_types_only(wide, load):
    llm = with_types(load, wide, "q8_0", "q4_0", kv_ratio=0.25)
    state = llm.save_state()
    twin = with_types(load, wide, "q8_0", "q4_0", kv_ratio=0.25)
    twin.load_state(state)
    assert twin.save_state().llama_state == state.llama_state
    llm.load_state(state)
    for some in (llm, twin):
        some.eval(MORE)
    np.testing.assert_array_equal(last_logits(llm), last_logits(twin))
    other = with_types(load, wide, "q8_0", "q8_0", kv_ratio=0.25)
    with pytest.raises(StateError, match="state: expected type_v 8, got 2"):
        other.load_state(state)
    assert other.n_tokens == len(TOKENS)
    other = with_types(load, wide, "q8_0", "q4_0", kv_ratio=0.25, kv_type_stage="f16")
    with pytest.raises(StateError, match="state: expected type_stage 1, got 8"):
        other.load_state(state)


def test_frames_are_in_a_state_without_rows(wide, load):
    """Streaming without sinks has none after a cut far back; what comes then is stored in the frames of before."""
    options = {**SMALL, "kv_compress": "streaming", "kv_sink": 0, "kv_ratio": 0.1}
    llm, twin = load(wide, **options), load(wide, **options)
    llm.eval(TOKENS)
    cut = llm._floor(100)
    assert cut > 0 and llm._ctx.kv_cache_seq_rm(-1, cut, -1)
    llm.n_tokens = cut
    assert llm.kv_stats().rows_used == 0
    twin.load_state(llm.save_state())
    for some in (llm, twin):
        some.eval([*TOKENS[:300], *MORE])
    np.testing.assert_array_equal(last_logits(llm), last_logits(twin))


def test_refused(wide, tiny, load):
    with pytest.raises(ArgumentError, match="kv_type_v: expected one of auto, f16, .*iq4_nl, got 'q2_k'"):
        load(wide, **SMALL, kv_type_v="q2_k")
    for name in ("kv_type_k", "kv_type_v", "kv_type_stage"):
        message = f"{name[3:]}: expected f16 for heads of 16 values, as in layer 0, got q8_0, whose blocks have 32; use"
        with pytest.raises(UnsupportedModelError, match=message):
            load(tiny("llama"), **SMALL, **{name: "q8_0"})
    with pytest.raises(ArgumentError, match="type_stage: expected f16 without flash attention, .* got q8_0; use f16"):
        load(wide, **SMALL, kv_type_stage="q8_0", flash_attn=False)
