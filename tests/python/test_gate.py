"""_gate.py: what llama.cpp would crash on is a StateError. After close(), and where threads meet in one model."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import closing

import pytest

from conftest import SMALL, check_stats, last_logits, random_tokens
from llama_semanticache import Llama, StateError

PROMPT = "".join(chr(97 + t % 26) for t in random_tokens(200))
TOKENS = random_tokens(150)
CLOSED = r"^expected a model that is loaded, got one after close\(\); load it again$"
OTHER_THREAD = "^expected one thread at a time, got a call while another thread is using the model; wait .* or load"

both = pytest.mark.parametrize("options", [SMALL, dict(n_ctx=1024)], ids=["compressed", "uncompressed"])

# name: a call of a model with its state; before close() each of them works
USES = {
    "eval": lambda llm, state: llm.eval([5]),
    "sample": lambda llm, state: llm.sample(temp=0),
    "reset": lambda llm, state: llm.reset(),
    "save_state": lambda llm, state: llm.save_state(),
    "load_state": lambda llm, state: llm.load_state(state),
    "generate": lambda llm, state: next(llm.generate(TOKENS)),
    "generate with reset=False": lambda llm, state: next(llm.generate([5], reset=False)),
    "create_completion": lambda llm, state: llm.create_completion(PROMPT, max_tokens=2),
    "stream": lambda llm, state: next(llm.create_completion(PROMPT, max_tokens=2, stream=True)),
    "call": lambda llm, state: llm(PROMPT, max_tokens=2),
    "chat": lambda llm, state: llm.create_chat_completion([{"role": "user", "content": "abc"}], max_tokens=2),
}
HARMLESS = {  # that another thread may do meanwhile
    "tokenize": lambda llm, state: llm.tokenize(b"abc"),
    "detokenize": lambda llm, state: llm.detokenize([100]),
    "tokenizer": lambda llm, state: llm.tokenizer().encode("abc"),
    "tokenizer's text": lambda llm, state: llm.tokenizer().decode([100]),
    "n_ctx": lambda llm, state: llm.n_ctx(),
    "n_vocab": lambda llm, state: llm.n_vocab(),
    "n_embd": lambda llm, state: llm.n_embd(),
    "token_eos": lambda llm, state: llm.token_eos(),
    "token_bos": lambda llm, state: llm.token_bos(),
    "token_nl": lambda llm, state: llm.token_nl(),
    "pooling_type": lambda llm, state: llm.pooling_type(),
    "ctx": lambda llm, state: llm.ctx,
    "model": lambda llm, state: llm.model,
    "kv_stats": lambda llm, state: llm.kv_stats(),
}


@pytest.fixture
def used(tiny, load, options):
    """A model that has read a text, and its state."""
    llm = load(tiny("llama"), **options)
    llm.eval(TOKENS)
    return llm, llm.save_state()


@both
@pytest.mark.parametrize("use", USES | HARMLESS)
def test_use_after_close(use, used):
    call = (USES | HARMLESS)[use]
    call(*used)
    used[0].close()
    with pytest.raises(StateError, match=CLOSED):
        call(*used)


def test_embeddings_after_close(tiny, load):
    llm = load(tiny("llama"), n_ctx=512, embedding=True)
    assert len(llm.embed("abc")[0]) == 64
    llm.close()
    for call in (llm.embed, llm.create_embedding):
        with pytest.raises(StateError, match=CLOSED):
            call("abc")


@both
def test_what_was_begun_before_close(used):
    llm, _ = used
    tokens, tokenizer = llm.generate(TOKENS), llm.tokenizer()
    chunks = llm.create_completion(PROMPT, max_tokens=20, stream=True)
    chat = llm.create_chat_completion([{"role": "user", "content": "abc"}], max_tokens=20, stream=True)
    for stream in (tokens, chunks, chat):
        next(stream)
    llm.close()
    for stream in (tokens, chunks, chat):
        with pytest.raises(StateError, match=CLOSED):
            list(stream)
    for call in (lambda: tokenizer.encode("abc"), lambda: tokenizer.decode([100])):
        with pytest.raises(StateError, match=CLOSED):
            call()


@both
def test_close_twice(used):
    with closing(used[0]) as llm:
        llm.close()
    with pytest.raises(StateError, match=CLOSED):
        llm.eval([5])


@both
def test_close_within_a_call(used):
    """A logits processor is called by the sampler of the model that it would free."""
    llm, _ = used
    refused = []

    def processor(input_ids, scores):
        with pytest.raises(
            StateError, match=r"^expected close\(\) when no call .* got it within one.*; close"
        ) as error:
            llm.close()
        refused.append(error)
        return scores

    assert llm.create_completion(PROMPT, max_tokens=3, logits_processor=[processor])["usage"]["completion_tokens"] == 3
    assert len(refused) == 3
    llm.eval([5])


@both
def test_a_model_is_freed_with_its_last_reference(options, tiny):
    """Not when the garbage is collected: it holds gigabytes."""
    llm = Llama(tiny("llama"), **options, verbose=False)
    llm.create_completion(PROMPT, max_tokens=2)
    tokenizer, reference = llm.tokenizer(), weakref.ref(llm)
    gc.disable()
    try:
        del llm
        assert reference() is None
    finally:
        gc.enable()
    with pytest.raises(StateError, match=CLOSED):
        tokenizer.encode("abc")


class Paused:
    """A completion in a thread of its own that waits within its second token until it is told to go on."""

    def __init__(self, llm):
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.n_tokens, self.answer = 0, None
        self.thread = threading.Thread(target=self.run, args=(llm,))

    def run(self, llm):
        self.answer = llm.create_completion(PROMPT, max_tokens=30, temperature=0, logits_processor=[self.wait])

    def wait(self, input_ids, scores):
        self.n_tokens += 1
        if self.n_tokens == 2:
            self.inside.set()
            assert self.go_on.wait(60)
        return scores

    def __enter__(self):
        self.thread.start()
        assert self.inside.wait(60)
        return self

    def __exit__(self, *_):
        self.go_on.set()
        self.thread.join(60)


@both
def test_two_threads_in_one_model(used):
    """The second is refused at once, the first is not disturbed, and the model goes on."""
    llm, state = used
    expected = llm.create_completion(PROMPT, max_tokens=30, temperature=0)["choices"]
    llm.reset()
    with Paused(llm) as other:
        for name, call in {**USES, "close": lambda llm, state: llm.close()}.items():
            with pytest.raises(StateError, match=OTHER_THREAD):
                call(llm, state)
                pytest.fail(name)
        for call in HARMLESS.values():
            call(llm, state)
    assert other.answer["choices"] == expected
    for call in USES.values():
        call(llm, state)
    assert llm.n_tokens == llm.kv_stats().n_tokens
    if llm.kv_compress:
        check_stats(llm)


@both
def test_one_stream_from_changing_threads(used):
    """As a server does it: every step may be another thread's, one at a time; between steps others may come in."""
    llm, _ = used
    expected = [
        c["choices"][0]["text"] for c in llm.create_completion(PROMPT, max_tokens=9, temperature=0, stream=True)
    ]
    llm.reset()
    stream, texts = llm.create_completion(PROMPT, max_tokens=9, temperature=0, stream=True), []
    end = object()

    def step():
        chunk = next(stream, end)
        texts.append(None if chunk is end else chunk["choices"][0]["text"])

    while not texts or texts[-1] is not None:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join(60)
        llm.save_state()
    assert texts[:-1] == expected


BETWEEN = "^expected the cache as the last step of this stream left it, got another call .* since; let a stream end"


@both
@pytest.mark.parametrize("name", [name for name in USES if name not in ("sample", "save_state")])
def test_what_changes_the_cache_between_two_steps(name, used):
    """Nobody gets tokens that follow another one's text."""
    llm, state = used
    streams = [
        llm.generate(TOKENS, temp=0),
        llm.create_completion(PROMPT, max_tokens=9, stream=True),
        llm.create_chat_completion([{"role": "user", "content": "abc"}], max_tokens=9, stream=True),
    ]
    for stream in streams:
        next(stream)
        next(stream)
        USES[name](llm, state)
        with pytest.raises(StateError, match=BETWEEN):
            next(stream)
    USES[name](llm, state)


@both
@pytest.mark.parametrize("name", [*HARMLESS, "sample", "save_state"])
def test_what_changes_nothing_between_two_steps(name, used):
    llm, state = used
    expected = [chunk["choices"] for chunk in llm.create_completion(PROMPT, max_tokens=9, temperature=0, stream=True)]
    llm.reset()
    chunks = []
    for chunk in llm.create_completion(PROMPT, max_tokens=9, temperature=0, stream=True):
        chunks.append(chunk["choices"])
        (USES | HARMLESS)[name](llm, state)
        llm.create_completion("begun by nobody", stream=True)
    assert chunks == expected


def test_threads_that_do_not_overlap(tiny, load):
    llm, twin = load(tiny("llama"), **SMALL), load(tiny("llama"), **SMALL)
    for i in range(0, len(TOKENS), 50):
        twin.eval(TOKENS[i : i + 50])
        thread = threading.Thread(target=llm.eval, args=(TOKENS[i : i + 50],))
        thread.start()
        thread.join(60)
    assert llm.n_tokens == len(TOKENS) and (last_logits(llm) == last_logits(twin)).all()


def test_many_threads_at_once(tiny, load):
    """Whoever comes in is served whole, the others are refused, and nothing is left over."""
    llm = load(tiny("llama"), **SMALL)
    prompts = [PROMPT, PROMPT[::-1], PROMPT.upper()]
    expected = llm.create_completion(PROMPT, max_tokens=10, temperature=0)["choices"]
    outcomes = []

    def ask(i):
        try:
            outcomes.append(llm.create_completion(prompts[i], max_tokens=10)["usage"]["completion_tokens"] == 10)
        except StateError as error:
            outcomes.append("another thread" in str(error))

    threads = [threading.Thread(target=ask, args=(i % 3,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert outcomes == [True] * 24
    llm.reset()
    assert llm.create_completion(PROMPT, max_tokens=10, temperature=0)["choices"] == expected
