"""Cores in q8_0 and q4_0: what they take, what they lose, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import tiny_models
from conftest import SMALL, check_stats, continue_with, kl, last_logits, random_tokens
from llama_semanticache import ArgumentError, StateError, UnsupportedModelError

TOKENS, MORE = random_tokens(500), random_tokens(150, seed=1)
BLOCK_BYTES = {"f16": 64, "q8_0": 34, "q4_0": 18}  # of 32 values


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
    for type_k, type_v in (("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0")):
        llm = with_types(load, wide, type_k, type_v, flash_attn=flash_attn)
        assert llm.kv_stats().rows_merged == 0
        loss[type_k, type_v] = kl(expected, continue_with(llm, MORE)).mean()
    assert loss["f16", "f16"] < 1e-5
    assert 1e-7 < loss["q8_0", "q8_0"] < 1e-3
    assert loss["q8_0", "q8_0"] < loss["q8_0", "q4_0"] < loss["q4_0", "q4_0"]


def test_auto_is_q8_0_where_heads_allow_it(wide, tiny, load):
    for path, same in ((wide, "q8_0"), (tiny("llama"), "f16")):
        auto, named = load(path, **SMALL).kv_stats(), load(path, **SMALL, kv_type_k=same, kv_type_v=same).kv_stats()
        assert auto.core_bytes == named.core_bytes > 0
    assert (
        load(wide, **SMALL).kv_stats().core_bytes
        < load(wide, **SMALL, kv_type_k="f16", kv_type_v="f16").kv_stats().core_bytes
    )


@pytest.mark.parametrize("type_k", BLOCK_BYTES)
@pytest.mark.parametrize("type_v", BLOCK_BYTES)
def test_bytes(wide, load, type_k, type_v):
    llm = with_types(load, wide, type_k, type_v, kv_ratio=0.25)
    stats = llm.kv_stats()
    assert stats.rows_merged > 0
    rows = 1024 // 4 * 2  # of a layer's two kv heads
    # K, V, bias and 16 bytes of row counts, each padded by the buffer to 32 bytes at most
    exact = 2 * (rows * (2 * BLOCK_BYTES[type_k] + 2 * BLOCK_BYTES[type_v] + 4) + 16)
    assert exact <= stats.core_bytes < exact + 2 * 4 * 32
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


def test_refused(wide, tiny, load):
    with pytest.raises(ArgumentError, match="kv_type_v: expected one of auto, f16, q8_0, q4_0, got 'q5_0'"):
        load(wide, **SMALL, kv_type_v="q5_0")
    with pytest.raises(
        UnsupportedModelError, match="cores of q8_0: expected heads of a multiple of 32 values, got 16 for K in layer 0"
    ):
        load(tiny("llama"), **SMALL, kv_type_k="q8_0")
