"""Re-use of a prefix: floor, cuts, chats of several turns."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest

from conftest import EXACT, SMALL, check_stats, continue_with, count_evals, kl, last_logits, random_tokens
from llama_semanticache import _native

TOKENS = random_tokens(500)
MORE = random_tokens(100, seed=1)


@pytest.fixture
def filled(tiny, load):
    """filled() -> an object after passes over TOKENS."""

    def make(arch="llama", **options):
        llm = load(tiny(arch), **{**SMALL, **options})
        llm.eval(TOKENS)
        assert llm.kv_stats().n_pass >= 5
        return llm

    return make


def test_floor(filled):
    llm = filled()
    stats = llm.kv_stats()
    begin = stats.n_tokens - stats.n_tokens_stage  # of the stage
    floors = [llm._floor(p) for p in range(stats.n_tokens + 1)]
    assert floors[begin:] == list(range(begin, stats.n_tokens + 1))
    assert all(q <= p for p, q in enumerate(floors))
    assert floors == sorted(floors)
    cuts = sorted(set(floors[:begin]))
    assert cuts[0] == 0 and len(cuts) > 10
    assert all(llm._floor(q) == q for q in cuts)
    # chunks end at delimiters and are at most 32 tokens long; the first cut may lie a chunk and the sinks further
    gaps = np.diff([*cuts, begin])
    assert gaps[1:].max() <= 32 and gaps[0] <= 4 + 2 * 32


def test_floor_before_any_pass(tiny, load):
    llm = load(tiny("llama"), **SMALL)
    assert llm._floor(0) == 0
    llm.eval(TOKENS[:60])
    assert [llm._floor(p) for p in (0, 1, 30, 60)] == [0, 1, 30, 60]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "lfm2"])
def test_a_cut_elsewhere_fails_and_changes_nothing(arch, filled):
    llm, twin = filled(arch), filled(arch)
    begin = llm.kv_stats().n_tokens - llm.kv_stats().n_tokens_stage
    bad = [p for p in range(1, begin) if llm._floor(p) != p]
    assert len(bad) > 100
    was = llm.kv_stats(), llm.kv_rows()
    for p in bad[::7]:
        assert not llm._ctx.kv_cache_seq_rm(0, p, -1)
    assert not llm._ctx.kv_cache_seq_rm(0, 100, 200)  # nor can a part in the middle of the cores go
    assert not llm._ctx.kv_cache_seq_rm(0, 0, 200)
    assert (llm.kv_stats(), llm.kv_rows()) == was
    np.testing.assert_array_equal(continue_with(llm, MORE), continue_with(twin, MORE))


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3", "lfm2"])
def test_a_reused_prefix_gives_what_a_fresh_run_gives(arch, filled, tiny, load):
    """Below capacity, wherever the texts part; sliding-window layers have forgotten what lies far behind."""
    full = load(tiny(arch), n_ctx=1024, n_batch=80)
    for prefix in (64, 90, 200, 316, 400, 470):
        llm = filled(arch, kv_ratio=1, flash_attn=False, **EXACT)
        prompt = TOKENS[:prefix] + [MORE[0] if MORE[0] != TOKENS[prefix] else MORE[1], *MORE]
        next(llm.generate(list(prompt), temp=0))
        full.reset()
        full.eval(prompt)
        assert llm.input_ids[: len(prompt)].tolist() == prompt
        assert kl(last_logits(full), last_logits(llm)) < 1e-5, prefix


@pytest.mark.parametrize("swa_full", [False, True])
def test_sliding_windows_must_hold_what_lies_before_a_cut(swa_full, tiny, load):
    """Unless they have all cells, an early cut starts anew."""
    llm = load(tiny("gemma3"), **SMALL, swa_full=swa_full)
    llm.eval(TOKENS)
    counts = count_evals(llm)
    next(llm.generate([*TOKENS[:200], *MORE[:60]], temp=0))
    assert 60 <= sum(counts) < 60 + 64 if swa_full else sum(counts) == 260


def test_every_cut_at_a_floor_succeeds(filled):
    llm = filled()
    begin = llm.kv_stats().n_tokens - llm.kv_stats().n_tokens_stage
    cuts = sorted({llm._floor(p) for p in range(llm.n_tokens + 1)}, reverse=True)
    rows = llm.kv_stats().rows_used
    for cut in cuts:
        assert llm._ctx.kv_cache_seq_rm(0, cut, -1)
        stats = llm.kv_stats()
        assert stats.n_tokens == cut
        assert stats.n_tokens_stage == max(0, cut - begin)
        assert stats.rows_used <= rows
        rows = stats.rows_used
    assert rows == 0


def test_a_cut_in_the_stage_is_as_if_the_tokens_had_never_been(tiny, load):
    llm, twin = load(tiny("llama"), **SMALL), load(tiny("llama"), **SMALL)
    llm.eval(TOKENS[:300])
    twin.eval(TOKENS[:240] + MORE[:60])
    cut = 235  # in the stage, before the texts part
    assert llm.kv_stats().n_tokens_stage > 300 - cut
    for some in (llm, twin):
        assert some._ctx.kv_cache_seq_rm(0, cut, -1)
        some.n_tokens = cut
        assert some.kv_stats().n_tokens == cut
    assert llm.kv_rows() == twin.kv_rows()
    np.testing.assert_array_equal(continue_with(twin, MORE), continue_with(llm, MORE))


def test_generation_after_a_cut_in_the_cores(filled):
    llm = filled()
    cut = llm._cut(250)
    llm.n_tokens = cut
    assert 200 < cut <= 250 and llm.kv_stats().n_tokens == cut
    llm.eval(TOKENS[cut:])
    stats = llm.kv_stats()
    assert stats.n_tokens == llm.n_tokens == len(TOKENS)
    assert np.isfinite(last_logits(llm)).all()
    check_stats(llm)


def test_nothing_is_lost_by_a_cut_below_capacity(filled, tiny, load):
    llm = filled(kv_ratio=1)
    cut = llm._cut(250)
    llm.n_tokens = cut
    full = load(tiny("llama"), n_ctx=1024, n_batch=80)
    full.eval(TOKENS[:cut])
    for some in (llm, full):
        some.eval(MORE)
        some.eval(TOKENS[:200])
    assert llm.kv_stats().rows_merged == 0
    assert kl(last_logits(full), last_logits(llm)) < 1e-5


def test_setting_n_tokens_into_the_compressed_part_evaluates_what_is_missing(filled):
    llm, twin = filled(), filled()
    target = next(p for p in range(260, 240, -1) if llm._floor(p) < p - 2)
    cut = llm._floor(target)
    llm.n_tokens = target
    llm.eval(MORE)
    assert llm.kv_stats().n_tokens == llm.n_tokens == target + len(MORE)
    assert llm.input_ids[: llm.n_tokens].tolist() == TOKENS[:target] + MORE
    twin.n_tokens = twin._cut(cut)
    twin.eval(TOKENS[cut:target])
    twin.eval(MORE)
    assert llm.kv_rows() == twin.kv_rows()
    np.testing.assert_array_equal(last_logits(llm), last_logits(twin))


def test_reset_begins_anew(filled, tiny, load):
    llm, fresh = filled(), load(tiny("llama"), **SMALL)
    llm.reset()
    for some in (llm, fresh):
        some.eval(TOKENS[:300])
    assert llm.kv_rows() == fresh.kv_rows()
    assert llm.kv_stats().rows_merged == fresh.kv_stats().rows_merged
    np.testing.assert_array_equal(last_logits(llm), last_logits(fresh))


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_chat_evaluates_every_turn_once(arch, tiny, load):
    llm = load(tiny(arch), **{**SMALL, "n_ctx": 2048})
    counts = count_evals(llm)
    messages = []
    seen = 0
    for turn in range(5):
        question = "".join(chr(97 + t % 26) for t in random_tokens(150, seed=turn))
        messages.append({"role": "user", "content": question})
        del counts[:]
        out = llm.create_chat_completion(messages, max_tokens=20, temperature=0)
        n_prompt, n_answer = out["usage"]["prompt_tokens"], out["usage"]["completion_tokens"]
        if turn > 0:
            # the new question and answer, and at most two chunks and the last answer a second time
            assert sum(counts) <= (n_prompt - seen) + n_answer + 2 * 32 + 20
            assert sum(counts) < n_prompt
        seen = n_prompt
        messages.append({"role": "assistant", "content": out["choices"][0]["message"]["content"]})
        check_stats(llm)
    assert llm.kv_stats().n_pass > 5
    assert llm.kv_stats().rows_merged > 0


def test_a_prompt_that_is_in_the_cache_already_costs_a_chunk_at_most(filled):
    llm = filled()
    counts = count_evals(llm)
    next(llm.generate(list(TOKENS), temp=0))
    assert sum(counts) == 0  # logits of the last token are still there
    next(llm.generate(TOKENS[:499], temp=0))
    assert sum(counts) == 1
    del counts[:]
    next(llm.generate(TOKENS[:250], temp=0))
    assert 1 <= sum(counts) <= 33
    del counts[:]
    next(llm.generate(TOKENS[:200] + MORE, temp=0))
    assert len(MORE) <= sum(counts) <= len(MORE) + 32
    assert llm.input_ids[:300].tolist() == TOKENS[:200] + MORE


@pytest.mark.parametrize("positional", [False, True])
def test_generation_without_reset_keeps_everything(positional, filled):
    llm, twin = filled("llama"), filled("llama")
    was = llm.n_tokens
    reset = dict(args=(40, 0.95, 0.05, 1.0, 0.8, 1.0, False)) if positional else dict(kwargs=dict(reset=False))
    next(llm.generate(MORE[:3], *reset.get("args", ()), **reset.get("kwargs", {})))
    twin.eval(MORE[:3])
    assert llm.n_tokens == was + 3
    np.testing.assert_array_equal(last_logits(llm), last_logits(twin))


def test_an_unrelated_prompt_begins_anew(filled, tiny, load):
    llm, fresh = filled(), load(tiny("llama"), **SMALL)
    prompt = [2, *MORE, *MORE]
    tokens = [next(some.generate(list(prompt), temp=0)) for some in (llm, fresh)]
    assert tokens[0] == tokens[1]
    assert llm.kv_rows() == fresh.kv_rows()
    np.testing.assert_array_equal(last_logits(llm), last_logits(fresh))


def test_positions_cannot_be_shifted(filled):
    import llama_cpp

    llm, twin = filled(), filled()
    memory = llama_cpp.llama_get_memory(llm._ctx.ctx)
    assert not llama_cpp.llama_memory_can_shift(memory)
    llama_cpp.llama_memory_seq_add(memory, 0, 450, -1, -10)
    llama_cpp.llama_memory_seq_div(memory, 0, 450, -1, 2)
    np.testing.assert_array_equal(continue_with(llm, MORE[:5]), continue_with(twin, MORE[:5]))


@pytest.mark.parametrize("arch", ["gemma3", "lfm2"])
def test_positions_cannot_be_shifted_beside_other_layers(arch, tiny, load):
    """With sliding windows, or with a recurrent state: they must not move alone."""
    import llama_cpp

    llm, twin = (load(tiny(arch), **SMALL) for _ in range(2))
    for each in (llm, twin):
        each.eval(list(range(20, 220)))
    memory = llama_cpp.llama_get_memory(llm._ctx.ctx)
    llama_cpp.llama_memory_seq_add(memory, 0, 190, -1, -10)
    llama_cpp.llama_memory_seq_div(memory, 0, 190, -1, 2)
    assert llama_cpp.llama_memory_seq_pos_max(memory, 0) == 199
    np.testing.assert_array_equal(continue_with(llm, MORE[:5]), continue_with(twin, MORE[:5]))


def test_a_text_beside_sliding_windows_that_begins_anywhere(tiny, load):
    """Nothing comes before its first token, so that every cut finds what the windows need."""
    llm = load(tiny("gemma3"), **SMALL)
    llm._batch.set_batch(batch=list(range(20, 60)), n_past=300, logits_all=False)
    llm._ctx.decode(llm._batch)
    assert llm._floor(320) == 320
    assert llm._ctx.kv_cache_seq_rm(0, 320, -1) and llm.kv_stats().n_tokens == 320


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_there_is_one_sequence(arch, filled):
    import llama_cpp

    llm, twin = filled(arch), filled(arch)
    memory = llama_cpp.llama_get_memory(llm._ctx.ctx)
    llama_cpp.llama_memory_seq_cp(memory, 0, 0, -1, -1)
    llama_cpp.llama_memory_seq_keep(memory, 0)
    assert (
        "only sequence stays where it is" in _native.load()[0].string(_native.load()[1].semcache_last_error()).decode()
    )
    np.testing.assert_array_equal(continue_with(llm, MORE[:5]), continue_with(twin, MORE[:5]))


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_text_that_begins_anywhere_is_cut_as_one_that_begins_at_0(arch, tiny, load):
    """As in llama.cpp's own caches; sliding windows must hold what comes before a cut, but nothing before the text."""
    begin, n_part = 50, 80
    ends = []
    for first in (0, begin):
        llm = load(tiny(arch), **SMALL, swa_full=True)
        for i in range(0, 400, n_part):
            llm._batch.set_batch(batch=TOKENS[i : i + n_part], n_past=first + i, logits_all=False)
            llm._ctx.decode(llm._batch)
        memory = llama_cpp.llama_get_memory(llm.ctx)
        assert llama_cpp.llama_memory_seq_pos_min(memory, 0) == first
        cuts = sorted({llm._floor(first + p) for p in range(401)} - {0}, reverse=True)
        assert llm._floor(first + 3) == 0 and min(cuts) > first + SMALL["kv_window"]
        for cut in cuts[::7]:
            assert llm._ctx.kv_cache_seq_rm(0, cut, -1)
        assert llm._ctx.kv_cache_seq_rm(0, first, -1)
        assert llama_cpp.llama_memory_seq_pos_max(memory, 0) == -1 and llm.kv_stats().rows_used == 0
        ends.append([cut - first for cut in cuts])
    assert ends[0] == ends[1] and len(ends[0]) > 20
