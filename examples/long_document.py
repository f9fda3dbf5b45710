"""Reads a long document with a compressed KV cache, asks for facts in it, and compares with the uncompressed cache.

    make demo                                  # or: python examples/long_document.py [--model PATH] [--kv-ratio 0.25]

The document is the beginning of Pride and Prejudice (models/texts) with five facts put in far apart. Every question
comes after the whole document has been read, and its answer is streamed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llama_semanticache import KVStats, Llama, models, profile
from llama_semanticache.cli.answer import reading
from llama_semanticache.config import KVConfig

DOCUMENT = Path(__file__).parents[1] / "models" / "texts" / "long-document.txt"
N_DOCUMENT = 6600  # tokens
N_CTX = 8192

FACTS = [  # (depth, sentence, question, what a right answer contains)
    (
        0.08,
        "The access code of the Ashcombe lighthouse is 48213.",
        "What is the access code of the Ashcombe lighthouse?",
        "48213",
    ),
    (
        0.29,
        "The keeper of the Corvane library is called Edith Penrose.",
        "What is the keeper of the Corvane library called?",
        "Edith Penrose",
    ),
    (
        0.50,
        "The access code of the Merrow hospital is 70956.",
        "What is the access code of the Merrow hospital?",
        "70956",
    ),
    (
        0.71,
        "The Eastfold museum was opened on 9 October 1847.",
        "When was the Eastfold museum opened?",
        "9 October 1847",
    ),
    (
        0.90,
        "The keeper of the Glenholt chapel is called Hector Yarrow.",
        "What is the keeper of the Glenholt chapel called?",
        "Hector Yarrow",
    ),
]


def document(llm: Llama) -> str:
    """The text with the facts at the ends of its sentences."""
    tokens = llm.tokenize(DOCUMENT.read_bytes(), add_bos=False, special=False)[: N_DOCUMENT - 20 * len(FACTS)]
    text = llm.detokenize(tokens).decode("utf-8", "ignore")
    for depth, sentence, _, _ in reversed(FACTS):
        at = text.index(". ", int(depth * len(text))) + 1
        text = f"{text[:at]} {sentence}{text[at:]}"
    return text


def ask(llm: Llama, text: str, console: Console) -> tuple[int, KVStats, float, float, float]:
    """Asks every question; returns right answers, statistics, tokens per second of prefill and decode, and the share of
    passes in the prefill.
    """
    n_right, n_new, decode_s = 0, 0, 0.0
    prefill_tps = passes = 0.0
    for _, _, question, want in FACTS:
        prompt = f"Read the text and answer the question at its end in one sentence.\n\n{text}\n\nQuestion: {question}"
        start = time.perf_counter()
        stream = llm.create_chat_completion(
            [{"role": "user", "content": prompt}], max_tokens=40, temperature=0.0, stream=True
        )
        answer, first = "", None
        with reading(llm):
            for chunk in stream:
                piece = chunk["choices"][0]["delta"].get("content", "")
                if piece and first is None:
                    first = time.perf_counter()
                    if not prefill_tps:  # the later questions re-use the document: only the first tells how fast
                        prefill_tps = llm.n_tokens / (first - start)
                        passes = llm.kv_stats().pass_s / (first - start)
                    console.print(f"[bold]{question}[/bold] ", end="")
                elif piece:
                    n_new += 1
                answer += piece
                console.print(piece, end="", highlight=False)
        decode_s += time.perf_counter() - (first or start)
        right = want in answer
        n_right += right
        console.print(" [green]right[/green]" if right else f" [red]wrong, it is {want}[/red]")
    return n_right, llm.kv_stats(), prefill_tps, n_new / decode_s, passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=models.default_name(), help="GGUF file or name of a model")
    parser.add_argument("--kv-ratio", type=float, default=KVConfig.kv_ratio)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()

    console = Console(width=110)
    model = models.open_model(args.model)
    options = dict(n_ctx=N_CTX, n_threads=args.threads, n_threads_batch=args.threads, flash_attn=True, verbose=False)
    config = KVConfig("semanticache", args.kv_ratio)
    profile.ensure(model, n_threads=args.threads, config=config)  # says so if it has to measure the model first
    results = {}
    for name, kv in (("uncompressed", {}), ("semanticache", config.arguments())):
        llm = Llama(model, **options, **kv)
        text = document(llm)
        n_tokens = len(llm.tokenize(text.encode(), add_bos=False, special=False))
        console.rule(f"{name}: {model.name}, document of {n_tokens} tokens")
        results[name] = ask(llm, text, console)
        n_head = len(llm.kv_rows())
        llm.close()

    ratio = config.ratio(model.shape.n_head_kv)
    table = Table(title=f"n_ctx {N_CTX}, kv_ratio {ratio:g}, measured in this run")
    for column in ("", *results):
        table.add_column(column, justify="left" if not column else "right")
    full, ours = (r[1] for r in results.values())
    rows = {
        "right answers": [f"{r[0]} of {len(FACTS)}" for r in results.values()],
        "context tokens seen": [str(s.n_tokens) for s in (full, ours)],
        "rows held per head, mean": [str(full.n_tokens), f"{ours.rows_used / n_head + ours.n_tokens_stage:.0f}"],
        "KV cache, MiB": [f"{s.total_bytes / 2**20:.1f}" for s in (full, ours)],
        "times smaller": ["1.0", f"{ours.compression_factor:.2f}"],
        "prefill, tokens/s": [f"{r[2]:.0f}" for r in results.values()],
        "decode, tokens/s": [f"{r[3]:.1f}" for r in results.values()],
        "passes, share of prefill": ["", f"{results['semanticache'][4]:.0%}"],
    }
    for label, cells in rows.items():
        table.add_row(label, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
