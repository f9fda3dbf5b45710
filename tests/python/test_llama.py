"""Everything of llama_cpp.Llama while passes happen."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from conftest import (
    EXACT,
    N_THREADS,
    SMALL,
    check_stats,
    count_evals,
    decode_at_once,
    kl,
    last_logits,
    random_tokens,
    sentences,
    text_tokens,
)
from llama_semanticache import Llama, _native
from llama_semanticache.llama import KVStats

PROMPT = "".join(chr(97 + t % 26) if i % 9 else ". " for i, t in enumerate(random_tokens(300)))


@pytest.fixture
def llm(tiny, load):
    """A tiny model; its answers are long enough for passes, and reset() makes every answer independent."""
    return load(tiny("llama"), **SMALL)


def complete(llm, prompt=PROMPT, **options):
    llm.reset()
    before = llm.kv_stats().n_pass
    answer = llm.create_completion(prompt, **{"max_tokens": 100, "temperature": 0, **options})
    if not options.get("stream"):
        assert llm.kv_stats().n_pass > before
        check_stats(llm)
    return answer


def text_of(answer):
    return answer["choices"][0]["text"]


def test_completion_counts_tokens(llm):
    n_prompt = len(llm.tokenize(PROMPT.encode()))
    answer = complete(llm)
    assert answer["usage"] == {"prompt_tokens": n_prompt, "completion_tokens": 100, "total_tokens": n_prompt + 100}
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(text_of(answer)) >= 90
    stats = llm.kv_stats()
    assert stats.n_tokens == llm.n_tokens == n_prompt + 99  # the last token was sampled, but not evaluated
    assert stats.rows_used <= stats.rows_allocated
    assert sum(used for *_, used in llm.kv_rows()) == stats.rows_used


def test_streaming_gives_the_same_text(llm):
    whole = text_of(complete(llm))
    parts = [text_of(part) for part in complete(llm, stream=True)]
    assert "".join(parts) == whole and len(parts) > 50


def test_stop_words(llm):
    whole = text_of(complete(llm))
    stop = whole[60:63]
    answer = complete(llm, stop=[stop])
    assert text_of(answer) == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert "".join(text_of(part) for part in complete(llm, stop=[stop], stream=True)) == whole[: whole.index(stop)]


def test_grammar(llm):
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    assert text_of(complete(llm, grammar=grammar)) in ("yes", "no")
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    grammar = llama_cpp.LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)
    answer = complete(llm, grammar=grammar, max_tokens=200)
    if answer["choices"][0]["finish_reason"] == "stop":
        assert set(json.loads(text_of(answer))) == {"ok"}
    else:  # the grammar allows white space without end
        assert text_of(answer).lstrip().startswith("{")


def test_logprobs(tiny, load):
    llm = load(tiny("llama"), **SMALL, logits_all=True)
    completion = complete(llm, logprobs=3)
    answer, n_prompt = completion["choices"][0], completion["usage"]["prompt_tokens"]
    logprobs = answer["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 100
    for i, (value, top) in enumerate(zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)):
        best = np.argsort(-llm.scores[n_prompt - 1 + i], kind="stable")[:3]
        texts = {llm.detokenize([int(t)]).decode("utf-8", "ignore") for t in best}
        assert value <= 0 and set(top) == texts | {logprobs["tokens"][i]}  # by text: different tokens may have the same
        assert sum(math.exp(x) for x in top.values()) <= 1.001
        assert value == pytest.approx(max(top.values()))  # greedy
    assert text_of(complete(llm, logprobs=3)) == text_of({"choices": [answer]})


def test_logits_all_holds_every_position(tiny, load):
    llm, other = load(tiny("llama"), **SMALL, logits_all=True), load(tiny("llama"), **SMALL)
    tokens = random_tokens(400)
    llm.eval(tokens)
    for i in range(0, 400, 80):
        other.eval(tokens[i : i + 80])
        # not to the bit: the output matrix meets one row here and 80 there
        assert kl(last_logits(other), llm.scores[other.n_tokens - 1]) < 1e-10


def test_logits_all_with_a_context_that_is_rounded_up(tiny, load):
    llm = load(tiny("llama"), **{**SMALL, "n_ctx": 600, "kv_ratio": 0.5}, logits_all=True)
    llm.eval(random_tokens(768))
    assert np.isfinite(llm.scores[:768]).all()


def test_seed_determinism(llm):
    texts = [text_of(complete(llm, temperature=1, seed=seed)) for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
    llm.set_seed(7)
    first = text_of(complete(llm, temperature=1))
    llm.set_seed(7)
    assert text_of(complete(llm, temperature=1)) == first


def test_timings_of_llama_cpp(smollm2, load):
    """A pass waits for the computation before it, which must not end the timing of the batch that it makes room for."""
    llm = load(smollm2, n_ctx=1024, kv_compress="semanticache", kv_profile=None, kv_stage=192, kv_window=64)
    start = time.perf_counter()
    llm.eval(text_tokens(llm, 600))
    llama_cpp.llama_synchronize(llm.ctx)
    wall_ms = 1e3 * (time.perf_counter() - start)
    perf = llama_cpp.llama_perf_context(llm.ctx)
    assert llm.kv_stats().n_pass >= 3 and perf.n_p_eval == 600
    assert 0.5 * wall_ms < perf.t_p_eval_ms <= wall_ms


def test_prompt_lookup_in_batches_smaller_than_a_draft(tiny, load):
    """Longer drafts are cut, or upstream would ask for logits that are gone."""
    prompt, small = PROMPT[:150] * 2, {**SMALL, "n_batch": 4}
    draft = LlamaPromptLookupDecoding(num_pred_tokens=10, max_ngram_size=1)
    plain, drafted = (
        load(tiny("llama"), **{**small, "kv_ratio": 1}),
        load(tiny("llama"), **{**small, "kv_ratio": 1}, draft_model=draft),
    )
    assert drafted.n_batch == 4
    counts = count_evals(drafted)
    assert text_of(complete(drafted, prompt)) == text_of(complete(plain, prompt))
    assert max(counts[-10:]) > 1  # drafts were evaluated
    assert (
        pickle.loads(pickle.dumps(drafted)).draft_model.num_pred_tokens == 10
        and drafted.__getstate__()["draft_model"] is draft
    )
    drafted.draft_model.num_pred_tokens = 3  # as of the object that was passed in
    assert draft.num_pred_tokens == 3 and pickle.loads(pickle.dumps(drafted.draft_model)).num_pred_tokens == 3


@pytest.mark.parametrize("ratio", [0.25, 1])
def test_prompt_lookup_gives_the_same_text(ratio, tiny, load):
    """A repeating prompt, so that drafts are made and often rejected: every rejection cuts the cache."""
    prompt = PROMPT[:150] * 2
    texts, decoded = [], []
    for draft in (None, LlamaPromptLookupDecoding(num_pred_tokens=6, max_ngram_size=1)):
        llm = load(tiny("llama"), **{**SMALL, "kv_ratio": ratio}, draft_model=draft)
        counts = count_evals(llm)
        texts.append(text_of(complete(llm, prompt)))
        decoded.append(sum(counts))
        assert llm.n_tokens == llm.kv_stats().n_tokens
    assert decoded[1] > decoded[0]  # drafts were evaluated
    # drafts move the moments of the passes; below capacity that changes nothing
    if ratio == 1:
        assert texts[0] == texts[1]
    else:
        assert len(texts[1]) >= 90


def test_echo(llm):
    assert text_of(complete(llm, echo=True)).startswith(PROMPT)


def test_a_generator_does_nothing_before_it_is_asked(llm):
    tokens = random_tokens(300)
    llm.eval(tokens)
    before = llm.n_tokens, llm.kv_stats()
    generator = llm.generate(tokens[:90], temp=0)
    assert (llm.n_tokens, llm.kv_stats()) == before
    next(generator)
    assert llm.n_tokens == 90


def test_logits_processor_and_bias(llm):
    token = llm.tokenize(b"q", add_bos=False)[-1]
    assert set(text_of(complete(llm, logit_bias={str(token): 100.0}))) == {"q"}


def test_tokenize_round_trip(llm):
    text = "Grüße, 世界! {x: 1}".encode()
    assert llm.detokenize(llm.tokenize(text, add_bos=False)) == text


def test_a_cancelled_stream_leaves_the_cache_usable(llm):
    expected = text_of(complete(llm))
    for n in (1, 30, 77):
        stream = complete(llm, stream=True)
        for _ in range(n):
            next(stream)
        stream.close()
        assert llm.n_tokens == llm.kv_stats().n_tokens
        check_stats(llm)
        again = llm.create_completion(PROMPT + " and", max_tokens=5, temperature=0)
        assert again["usage"]["completion_tokens"] == 5
        assert text_of(complete(llm)) == expected


def test_a_prompt_far_longer_than_the_rows_streams_through_passes(tiny, load):
    llm = load(tiny("llama"), **{**SMALL, "n_ctx": 4096, "kv_ratio": 0.05})
    rows = llm.kv_stats().rows_allocated // len(llm.kv_rows())
    assert rows < 210
    tokens = random_tokens(4000)
    llm.eval(tokens)
    stats = llm.kv_stats()
    assert stats.n_tokens == 4000 and stats.n_pass >= 40
    assert stats.rows_used == stats.rows_allocated
    check_stats(llm)
    answer = llm.create_completion(tokens, max_tokens=20, temperature=0)
    assert answer["usage"]["prompt_tokens"] == 4000 and answer["usage"]["completion_tokens"] == 20
    assert np.isfinite(last_logits(llm)).all()


def test_generation_to_the_end_of_the_context(tiny, load):
    llm = load(tiny("llama"), **{**SMALL, "n_ctx": 512})
    answer = llm.create_completion(PROMPT, max_tokens=None, temperature=0)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] in (511, 512)


@pytest.mark.parametrize("n_batch", [32, 512, 2048])
def test_n_batch_is_what_was_asked_for(n_batch, tiny, load):
    llm = load(tiny("llama"), **{**SMALL, "n_ctx": 2048, "n_batch": n_batch})
    assert llm.n_batch == llama_cpp.llama_n_batch(llm.ctx) == n_batch
    assert llama_cpp.llama_n_ubatch(llm.ctx) == min(n_batch, 512, SMALL["kv_stage"] - SMALL["kv_window"])


@pytest.mark.parametrize("arch", ["llama", "gemma3", "lfm2"])
def test_a_batch_larger_than_the_stage(arch, tiny, load):
    """Passes run between its parts, where they come if these are decoded one by one."""
    tokens, n_part = random_tokens(84 * 10), 84
    whole, parts = (load(tiny(arch), **{**SMALL, "n_batch": 1024}) for _ in range(2))
    status, logits = decode_at_once(whole, tokens)
    assert status == 0 and whole.kv_stats().n_tokens == len(tokens) and whole.kv_stats().n_pass == 9
    for first in range(0, len(tokens), n_part):
        status, some = decode_at_once(parts, tokens[first : first + n_part], first)
        assert status == 0
        np.testing.assert_array_equal(some, logits[first : first + n_part])


def test_more_sinks_than_window(tiny, load):
    """A pass may not be asked for more tokens than there are behind the sinks."""
    options = {**SMALL, "kv_stage": 64, "kv_window": 8, "kv_sink": 16, "n_batch": 512}
    llm = load(tiny("llama"), **options)
    assert llama_cpp.llama_n_ubatch(llm.ctx) == 48
    tokens, first = random_tokens(600), 0
    for n in (10, 56, 64, 1, 48, 421):
        status, logits = decode_at_once(llm, tokens[first : first + n], first)
        first += n
        assert status == 0 and np.isfinite(logits).all()
    assert llm.kv_stats().n_tokens == 600 and llm.kv_stats().rows_used == llm.kv_stats().rows_allocated


FAILED_PART = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from conftest import decode_at_once, random_tokens
from llama_semanticache import Llama

llm = Llama(sys.argv[1], n_ctx=2048, kv_compress="semanticache", kv_ratio=0.25, kv_stage=1024, kv_window=16,
            kv_profile=None, n_batch=128, n_ubatch=64, n_threads=1, n_threads_batch=1, verbose=False)
tokens = random_tokens(1100)
for first in range(0, 896, 128):
    assert decode_at_once(llm, tokens[first : first + 128], first)[0] == 0
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), limits[1]))  # the scratch of a pass is about 10 MiB
status = decode_at_once(llm, tokens[896:1024], 896)[0]
resource.setrlimit(resource.RLIMIT_AS, limits)
print("failed", status, llm.kv_stats().n_tokens, llm.kv_stats().n_pass)
print("again", decode_at_once(llm, tokens[960:1024], 960)[0], llm.kv_stats().n_tokens, llm.kv_stats().n_pass)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by RLIMIT_AS, which other systems do not honour")
def test_what_was_read_before_a_pass_failed_stays(tiny):
    """The first half of the batch has room, the second needs a pass."""
    command = [sys.executable, "-c", FAILED_PART, tiny("llama"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["failed -3 960 0", "again 0 1024 1"], done.stderr[-2000:]


@pytest.mark.parametrize("n_tokens", range(12, 19))
def test_room_is_made_before_there_is_more_than_window_and_sinks(n_tokens, tiny, load):
    """A batch that has no room beside the window and a few sinks: the pass takes from the window then."""
    llm = load(tiny("llama"), **{**SMALL, **EXACT, "n_batch": 512, "kv_ratio": 1})
    full = load(tiny("llama"), n_ctx=1024, flash_attn=True)
    tokens = random_tokens(n_tokens + 84)
    for some in (llm, full):
        some.eval(tokens[:n_tokens])
        assert decode_at_once(some, tokens[n_tokens:], n_tokens)[0] == 0
    assert kl(last_logits(full), last_logits(llm)) < 1e-5


def test_n_ctx_is_the_logical_size(llm):
    assert llm.n_ctx() == llm.kv_stats().n_ctx == 1024
    assert llm.kv_stats().n_tokens == 0


def test_stats_are_complete_and_frozen(llm):
    stats = llm.kv_stats()
    assert isinstance(stats, KVStats)
    assert stats.kv_compress == "semanticache"
    with pytest.raises(AttributeError):
        stats.n_tokens = 1
    for field in fields(stats):
        assert (getattr(stats, field.name) is None) == (field.name == "why_uncompressed")
    full = 2 * 2 * 16 * 2 * 2 * 1024  # layers, kv heads, head size, K and V, bytes, tokens
    assert stats.full_bytes == full
    assert stats.rows_allocated == 0.25 * 1024 * 4
    assert stats.stage_bytes == full * 96 // 1024
    assert stats.other_bytes == 0
    llm.eval(random_tokens(300))
    after = llm.kv_stats()
    assert after.total_bytes == stats.total_bytes  # nothing grows
    assert after.pass_s > 0 and after.n_pass >= 3


def test_two_objects_do_not_disturb_each_other(tiny, load):
    a, b = load(tiny("llama"), **SMALL), load(tiny("qwen3"), **{**SMALL, "kv_compress": "paper"})
    tokens = random_tokens(400)
    for i in range(0, 400, 40):
        a.eval(tokens[i : i + 40])
        b.eval(tokens[i : i + 40])
    alone = load(tiny("llama"), **SMALL)
    for i in range(0, 400, 40):
        alone.eval(tokens[i : i + 40])
    np.testing.assert_array_equal(last_logits(a), last_logits(alone))


def test_the_compressed_cache_is_used_by_from_pretrained_and_call(tiny, monkeypatch, tmp_path):
    """Other ways in: __call__, and from_pretrained, which passes its arguments on."""
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *args, **kwargs: shutil.copy(tiny("llama"), tmp_path)
    )
    monkeypatch.setattr(
        huggingface_hub.HfFileSystem, "ls", lambda self, path, **kwargs: [{"name": f"{path}/llama.gguf"}]
    )
    llm = Llama.from_pretrained(
        "some/repo", "llama.gguf", local_dir=str(tmp_path), verbose=False, n_threads=1, n_threads_batch=1, **SMALL
    )
    assert isinstance(llm, Llama) and llm.kv_compress == "semanticache"
    llm(PROMPT, max_tokens=5)
    assert llm.kv_stats().n_pass > 0
    llm.close()


# ---------------------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def smol(smollm2):
    llm = Llama(
        smollm2,
        n_ctx=2048,
        n_threads=N_THREADS,
        n_threads_batch=N_THREADS,
        verbose=False,
        kv_compress="semanticache",
        kv_stage=128,
        kv_window=32,
        kv_ratio=0.25,
        kv_profile=None,
    )
    yield llm
    llm.close()


def test_a_chat_with_a_real_model(smol):
    """A fact at the start of a text of several passes, asked for at its end; the second turn re-uses the first."""
    story = " ".join(["The secret number of the harbour is 4711."] + sentences(17))
    messages = [{"role": "user", "content": f"{story}\nWhat is the secret number of the harbour?"}]
    answer = smol.create_chat_completion(messages, max_tokens=24, temperature=0)
    stats = smol.kv_stats()
    assert stats.n_pass >= 3
    assert stats.n_tokens == smol.n_tokens
    check_stats(smol)
    content = answer["choices"][0]["message"]["content"]
    assert "4711" in content

    messages += [
        {"role": "assistant", "content": content},
        {"role": "user", "content": "Thank you. And now say goodbye."},
    ]
    counts = count_evals(smol)
    parts = smol.create_chat_completion(messages, max_tokens=16, temperature=0, stream=True)
    text = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts)
    assert len(text) > 3
    assert sum(counts) < 120 < stats.n_tokens
    check_stats(smol)


def test_below_capacity_a_real_model_writes_the_same_words(smollm2, smol, load):
    """Greedy text at ratio 0.25 while nothing has been merged yet, through passes, against the uncompressed model."""
    prompt = (
        "List of the days of the week: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.\n" * 6
        + "List of the"
    )
    full = load(smollm2, n_ctx=2048)
    smol.reset()
    before = smol.kv_stats().n_pass
    texts = [text_of(some.create_completion(prompt, max_tokens=20, temperature=0)) for some in (full, smol)]
    assert smol.kv_stats().n_pass > before
    assert smol.kv_stats().rows_merged == 0
    assert texts[0] == texts[1]
    assert texts[0].startswith(" days of the week: Monday")


def test_the_library_for_images_is_there():
    from llama_cpp import mtmd_cpp

    assert Path(mtmd_cpp._libmtmd._name).parent == _native.library_folder()
    assert mtmd_cpp.mtmd_default_marker() == b"<__media__>"


def test_llama_cpp_is_silent_unless_asked(tiny, capfd):
    """Its log has thousands of lines."""
    options = {name: value for name, value in SMALL.items() if name != "verbose"}
    for verbose in (None, True):
        llm = Llama(tiny("llama"), **options, n_threads=1, **({} if verbose is None else {"verbose": verbose}))
        llm.eval(random_tokens(100))
        llm.close()
        said = capfd.readouterr().err
        assert ("llama_context" in said) == bool(verbose)


@pytest.mark.parametrize("kv_compress", [None, "semanticache"])
def test_progress_of_a_prompt(kv_compress, tiny, load):
    """By batches, whose logits are those of a prompt that nobody watches."""
    options = {**SMALL, "kv_compress": kv_compress} if kv_compress else dict(n_ctx=1024, n_batch=80)
    tokens, seen = random_tokens(250), []
    quiet, llm = load(tiny("llama"), **options), load(tiny("llama"), **options)
    quiet.eval(tokens)
    llm.on_progress = lambda done, total: seen.append((done, total))
    llm.eval(tokens)
    assert seen == [(80, 250), (160, 250), (240, 250), (250, 250)]
    np.testing.assert_array_equal(last_logits(llm), last_logits(quiet))
    llm.eval(tokens[:1])
    assert len(seen) == 4  # a token is no text
