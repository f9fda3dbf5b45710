"""A process that measures presses of NVIDIA's kvpress and Attention Matching: `quality.py` starts it with a Python that
has kvpress, torch and gguf.

It reads one JSON object a line from standard input and answers each with one line; it imports nothing of this package.
The GGUF file is loaded by transformers, with its weights dequantized to float32, and read whole; every layer's cache is
pruned when its keys are there, as kvpress does. KL is taken against the same model with its whole cache.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attention_matching
import kvpress
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PRESSES = {
    "keydiff": kvpress.KeyDiffPress,
    "knorm": kvpress.KnormPress,
    "expected-attention": kvpress.ExpectedAttentionPress,
    "snapkv": kvpress.SnapKVPress,
    "tova": kvpress.TOVAPress,
    "streaming": kvpress.StreamingLLMPress,
    "adakv": lambda compression_ratio: kvpress.AdaKVPress(
        kvpress.ExpectedAttentionPress(compression_ratio=compression_ratio)
    ),
    "kvzip": kvpress.KVzipPress,
}
VERSIONS = {name: version(name) for name in ("kvpress", "torch", "transformers")}
MASKING = {"adakv", "kvzip"}
"""These mark rows instead of removing them."""


class Model:
    def __init__(self, path: str):
        self.model = AutoModelForCausalLM.from_pretrained(
            str(Path(path).parent), gguf_file=Path(path).name, dtype=torch.float32
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(str(Path(path).parent), gguf_file=Path(path).name)
        self.references: dict[str, torch.Tensor] = {}
        self.tokenizer.chat_template = None  # the context is read as it is
        self.folder = tempfile.TemporaryDirectory()  # KVzip loads the tokenizer by the model's name
        self.tokenizer.save_pretrained(self.folder.name)
        self.model.config._name_or_path = self.folder.name

    def read(self, tokens: list[int], press: Any) -> tuple[DynamicCache, float]:
        cache = DynamicCache()
        start = time.perf_counter()
        with press(self.model) if press is not None else contextlib.nullcontext():
            self.model.model(input_ids=torch.tensor([tokens]), past_key_values=cache)
        return cache, time.perf_counter() - start

    def logits(self, tokens: list[int], n_past: int, cache: DynamicCache) -> torch.Tensor:
        """[len(tokens), n_vocab] behind n_past tokens, however many the cache still holds; the cache grows."""
        position = torch.arange(n_past, n_past + len(tokens))[None]
        return (
            self.model(input_ids=torch.tensor([tokens]), past_key_values=cache, position_ids=position).logits[0].float()
        )

    def answer(self, tokens: list[int], n_past: int, cache: DynamicCache, n: int) -> str:
        out: list[int] = []
        while len(out) < n:
            top = int(self.logits(tokens, n_past, cache)[-1].argmax())
            n_past += len(tokens)
            if top == self.tokenizer.eos_token_id:
                break
            out.append(top)
            tokens = [top]
        return self.tokenizer.decode(out)


def lengths(cache: DynamicCache) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


def cut(cache: DynamicCache, to: list[int]) -> None:
    """Takes away what was read behind the context."""
    for layer, n in zip(cache.layers, to, strict=True):
        layer.keys, layer.values = layer.keys[:, :, :n], layer.values[:, :, :n]


@contextlib.contextmanager
def compressed(model: Model, order: dict[str, Any]) -> Iterator[tuple[DynamicCache, float, int]]:
    """The cache of the order's text as its method leaves it, the seconds that took, and its bytes with K and V in f16,
    like all others'; inside, the model attends to it as the method wants it."""
    tokens, press = order["tokens"], order["press"]
    if press == attention_matching.NAME:
        repeat = model.tokenizer.encode(attention_matching.REPEAT, add_special_tokens=False)
        with attention_matching.Compaction(model.model, order["rows"]) as matching:
            start = time.perf_counter()
            cache = matching.read(tokens, repeat)
            yield cache, time.perf_counter() - start, matching.n_bytes
        return
    cache, seconds = model.read(tokens, PRESSES[press](compression_ratio=1 - order["keep"]))
    n_bytes = sum(2 * layer.keys.numel() + 2 * layer.values.numel() for layer in cache.layers)
    yield cache, seconds, round(n_bytes * (order["keep"] if press in MASKING else 1))


@torch.inference_mode()
def measure(model: Model, order: dict[str, Any]) -> dict[str, Any]:
    tokens, following = order["tokens"], order["following"]
    if order["case"] not in model.references:
        cache, _ = model.read(tokens, None)
        model.references[order["case"]] = model.logits(following, len(tokens), cache).log_softmax(-1)
    reference = model.references[order["case"]]
    with compressed(model, order) as (cache, seconds, n_bytes):
        held = lengths(cache)
        logp = model.logits(following, len(tokens), cache).log_softmax(-1)
        at = (torch.arange(len(following) - 1), torch.tensor(following[1:]))
        record: dict[str, Any] = {
            "kl": float((reference.exp() * (reference - logp)).sum(-1).mean()),
            "same_top": float((reference.argmax(-1) == logp.argmax(-1)).float().mean()),
            "log_ppl": float((reference[at] - logp[at]).mean()),
            "prefill_s": seconds,
            "pass_s": 0.0,
            "kv_bytes": n_bytes,
            "rows_used": sum(map(sum, order["rows"])) if "rows" in order else sum(held),
            "texts": [],
            "versions": VERSIONS,
        }
        for question in order["questions"]:
            cut(cache, held)
            record["texts"].append(model.answer(question["tokens"], len(tokens), cache, question["n"]))
    return record


def main() -> None:
    model = None
    for line in sys.stdin:
        order = json.loads(line)
        if "load" in order:
            model = Model(order["load"])
            answer: dict[str, Any] = {"ok": True}
        else:
            answer = measure(model, order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
