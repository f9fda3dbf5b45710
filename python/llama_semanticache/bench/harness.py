"""What the measurements of quality share: logits, snapshots of the cache, greedy answers."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..llama import Llama, llama_cpp
from ..model_file import ModelFile
from .settings import llama_options


class Loader:
    """Loads a model with one cache after the other; the same one is not loaded twice in a row."""

    def __init__(self, model: str | os.PathLike[str], common: Mapping[str, Any]):
        self.model, self.common = ModelFile.of(model), common
        self.setting: str | None = None
        self.llm: Llama | None = None

    def __call__(self, setting: str) -> Llama:
        if self.llm is None or setting != self.setting:
            self.close()
            self.llm = Llama(self.model, **self.common, **llama_options(setting))
            self.setting = setting
        return self.llm

    def close(self) -> None:
        if self.llm is not None:
            self.llm.close()
        self.llm, self.setting = None, None


def next_logits(llm: Llama, tokens: Sequence[int]) -> np.ndarray:
    """Logits after each of `tokens`, float32 [len(tokens), n_vocab]; at most n_batch tokens."""
    llm._batch.set_batch(batch=tokens, n_past=llm.n_tokens, logits_all=True)
    llm._ctx.decode(llm._batch)
    llm.input_ids[llm.n_tokens : llm.n_tokens + len(tokens)] = tokens
    llm.n_tokens += len(tokens)
    shape = (len(tokens), llm.n_vocab())
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=shape).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities, along the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


class Snapshot:
    """The whole context, to come back to."""

    def __init__(self, llm: Llama):
        size = llama_cpp.llama_state_get_size(llm.ctx)
        self.data = (ctypes.c_uint8 * size)()
        self.size = llama_cpp.llama_state_get_data(llm.ctx, self.data, size)
        self.n_tokens = llm.n_tokens

    def restore(self, llm: Llama) -> None:
        if llama_cpp.llama_state_set_data(llm.ctx, self.data, self.size) != self.size:
            raise RuntimeError("could not restore the context")
        llm.n_tokens = self.n_tokens


def continue_greedily(
    llm: Llama, tokens: Sequence[int], n_tokens: int, is_end: Callable[[str], bool] = lambda text: False
) -> str:
    """At most `n_tokens` most likely tokens behind the cache's text and `tokens`, as text; until the model or `is_end`
    of the text so far ends it.
    """
    out: list[int] = []
    text = ""
    starts = range(0, len(tokens), llm.n_batch)
    logits = [next_logits(llm, tokens[start : start + llm.n_batch])[-1] for start in starts][-1]
    while len(out) < n_tokens:
        top = int(logits.argmax())
        if llama_cpp.llama_vocab_is_eog(llm._model.vocab, top):
            break
        out.append(top)
        text = llm.detokenize(out).decode("utf-8", "ignore")
        if is_end(text) or len(out) == n_tokens:
            break
        logits = next_logits(llm, [top])[-1]
    return text


def read_in(llm: Llama, tokens: Sequence[int]) -> dict[str, Any]:
    """Reads a text into an empty cache; what it took."""
    llm.reset()
    before = llm.kv_stats().pass_s
    start = time.perf_counter()
    llm.eval(tokens)
    seconds = time.perf_counter() - start
    stats = llm.kv_stats()
    return {
        "prefill_s": seconds,
        "pass_s": stats.pass_s - before,
        "kv_bytes": stats.total_bytes,
        "rows_used": stats.rows_used,
    }


def render(llm: Llama, messages: Sequence[Any], prompt: bool) -> list[int]:
    """Tokens of a conversation by the model's own template; with the head of the next answer if it is a prompt."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = llm.metadata.get("tokenizer.chat_template")
    if template is None:
        raise ArgumentError(
            "model: expected one with a chat template, got one without; name an instruction-tuned model"
        )

    def token(number: int) -> str:
        return llm._model.token_get_text(number) if number >= 0 else ""

    form = Jinja2ChatFormatter(
        template, eos_token=token(llm.token_eos()), bos_token=token(llm.token_bos()), add_generation_prompt=prompt
    )
    return llm.tokenize(form(messages=list(messages)).prompt.encode(), add_bos=False, special=True)
