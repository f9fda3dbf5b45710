"""A process that holds one model with one kind of cache, and times what it is told to: `speed.py` starts one per
setting.

It reads one JSON object a line from standard input and answers each with one line. Imported as a file of its own, so
that a stock llama.cpp can be measured too: llama_cpp loads the library that LLAMA_CPP_LIB_PATH names.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def make(options: dict[str, Any]) -> Any:
    kv = options.pop("kv", None)
    cache = options.pop("cache", "f16")
    if kv is None:
        import llama_cpp

        kind = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}[
            cache
        ]
        return llama_cpp.Llama(**options, type_k=kind, type_v=kind)
    from llama_semanticache import Llama

    return Llama(**options, **kv)


def resident_bytes() -> int:
    """Of this process, without the file that the weights are mapped from."""
    import psutil

    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def is_ours(llm: Any) -> bool:
    return hasattr(llm, "kv_stats")


def timed(llm: Any, tokens: list[int], name: str, pass_name: str, one_by_one: bool = False) -> dict[str, float]:
    """Seconds for the tokens, behind those that are there; of ours also those of the passes among them."""
    before = llm.kv_stats().pass_s if is_ours(llm) else 0.0
    start = time.perf_counter()
    if one_by_one:
        for token in tokens:
            llm.eval([token])
    else:
        llm.eval(tokens)
    out = {name: time.perf_counter() - start}
    if is_ours(llm):
        out[pass_name] = llm.kv_stats().pass_s - before
    return out


def main() -> None:
    llm: Any = None
    for line in sys.stdin:
        order = json.loads(line)
        if "load" in order:
            llm = make(order["load"])
            answer: dict[str, Any] = {"ok": True}
        elif "tokenize" in order:
            answer = {"tokens": llm.tokenize(order["tokenize"].encode("utf-8"), special=False)}
        else:
            llm.reset()
            llm.eval(order["warm_up"])
            llm.reset()
            answer = {
                **timed(llm, order["prompt"], "prefill_s", "pass_s"),
                **timed(llm, order["decode"], "decode_s", "decode_pass_s", one_by_one=True),
            }
            answer["resident_bytes"] = resident_bytes()
            if is_ours(llm):
                stats = llm.kv_stats()
                answer.update(kv_bytes=stats.total_bytes, rows_used=stats.rows_used)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
