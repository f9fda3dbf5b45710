"""The architectures of llama.cpp, swept: `make archs` writes docs/models.md with it, test_archs.py runs a few of them.

llama.cpp's own program test-llama-archs writes a small random model of each architecture that it knows. Each is loaded
with a compressed cache and compared with llama.cpp's own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import llama_cpp
import numpy as np

from llama_semanticache import Llama, SemanticCacheError

# Without flash attention, whose sums llama.cpp rounds to f16: what is measured is ours.
N_CTX, N_TOKENS, N_BATCH, N_CUT, N_MORE = 512, 400, 80, 300, 3
STAGE = dict(kv_stage=128, kv_window=48, kv_profile=None)
EXACT = dict(kv_ratio=1, kv_type_k="f16", kv_type_v="f16", kv_type_stage="f16")
SEED = "7"
# Of the weights. With the program's own 0.1 attention is uniform and logits hardly depend on it: a cache that has lost
# 70% of its rows is off by a KL of 1e-10, so that being exact says nothing.
STDEV = "0.3"


@dataclass
class Result:
    """What the sweep found of one model.

    Attributes
    ----------
    name : str
        File of the model, without its ending: architecture, then dense or moe.
    refused : str or None
        Why its cache cannot be compressed.
    kl, kl_cut : float or None
        Largest KL divergence from llama.cpp's own cache with all rows in f16: over all tokens, and after a cut and
        three other tokens. NaN where llama.cpp's own logits are.
    kl_dropped : float or None
        The same as kl with kv_ratio 0.3: how much the model minds a cache that is not whole.
    factor : float or None
        How many times smaller the cache is at kv_ratio 0.25, sliding windows and recurrent states included.
    """

    name: str
    refused: str | None = None
    kl: float | None = None
    kl_cut: float | None = None
    kl_dropped: float | None = None
    factor: float | None = None


def architectures(tree: Path) -> list[str]:
    """Names of all architectures that a tree of llama.cpp knows."""
    text = (tree / "src" / "llama-arch.cpp").read_text(encoding="utf-8")
    table = text.split("LLM_ARCH_NAMES = {")[1].split("};")[0]
    return [name for name in re.findall(r'\{ *LLM_ARCH_\w+, *"([^"]+)" *\}', table) if not name.startswith("(")]


def write_models(tool: Path, arch: str, folder: Path) -> list[Path]:
    """Write the models of an architecture, dense and moe; none if llama.cpp's program has none."""
    before = set(folder.glob("*.gguf"))
    subprocess.run([tool, "-a", arch, "-s", SEED, "-d", STDEV, "-o", folder], capture_output=True, check=False)
    return sorted(set(folder.glob("*.gguf")) - before)


def decode(llm: Llama, tokens: list[int], n_past: int) -> np.ndarray:
    """Logits of every token, float32 [len(tokens), n_vocab], read in batches through the C API."""
    rows = []
    for i in range(0, len(tokens), N_BATCH):
        some = tokens[i : i + N_BATCH]
        llm._batch.set_batch(batch=some, n_past=n_past + i, logits_all=True)
        llm._ctx.decode(llm._batch)
        logits = ctypes.cast(llm._ctx.get_logits(), ctypes.POINTER(ctypes.c_float))
        rows.append(np.ctypeslib.as_array(logits, shape=(len(some), llm.n_vocab())).copy())
    return np.concatenate(rows)


def divergence(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Largest KL divergence of a token's distribution."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (theirs.astype(float), ours.astype(float)))
    return float(np.max(np.sum(np.exp(p) * (p - q), axis=-1)))


def load(path: Path, **options: object) -> Llama:
    common = dict(n_ctx=N_CTX, n_batch=N_BATCH, n_ubatch=N_BATCH, n_threads=1, n_threads_batch=1, verbose=False)
    return Llama(str(path), **{**common, "flash_attn": False, "swa_full": True, **options})  # type: ignore[arg-type]


def measure(path: Path) -> Result:
    """Sweep one model. Raises AssertionError if a compressed cache is wrong in another way than by its logits."""
    result = Result(path.stem)
    theirs = load(path)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, llama_cpp.llama_vocab_n_tokens(theirs._model.vocab), N_TOKENS + N_MORE).tolist()
    try:
        ours = load(path, kv_compress="semanticache", **STAGE, **EXACT)
        logits = decode(ours, tokens[:N_TOKENS], 0)
    except (SemanticCacheError, RuntimeError) as error:
        result.refused = str(error)
        return result
    expected = decode(theirs, tokens[:N_TOKENS], 0)
    result.kl = divergence(expected, logits)
    assert ours.kv_stats().n_pass >= 3

    ours.n_tokens = N_TOKENS
    cut = max(ours._floor(N_CUT), 0)
    if cut > 0 and all(llm._ctx.kv_cache_seq_rm(-1, cut, -1) for llm in (theirs, ours)):
        more = tokens[cut:N_CUT] + tokens[N_TOKENS:]
        result.kl_cut = divergence(decode(theirs, more, cut), decode(ours, more, cut))
    ours.close()
    ours = load(path, kv_compress="semanticache", **STAGE, **{**EXACT, "kv_ratio": 0.3})
    result.kl_dropped = divergence(expected, decode(ours, tokens[:N_TOKENS], 0))
    ours.close()

    small = load(path, kv_compress="semanticache", **STAGE, kv_ratio=0.25, swa_full=False)
    small.eval(tokens[:N_TOKENS])
    stats = small.kv_stats()
    assert stats.rows_used <= stats.rows_allocated and stats.n_tokens == N_TOKENS
    result.factor = stats.compression_factor
    state = small.save_state()
    expected = decode(small, tokens[N_TOKENS:], N_TOKENS)
    small.load_state(state)
    again = decode(small, tokens[N_TOKENS:], N_TOKENS)
    # the cells of a sliding window lie in another order then, as in llama.cpp alone: 4e-5 of 25 random layers
    assert divergence(expected, again) < 1e-3, "a restored state goes on in another way"
    return result


def measure_apart(path: Path) -> Result:
    """The same in a process of its own: llama.cpp may abort."""
    done = subprocess.run([sys.executable, __file__, "--one", path], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line or "ASSERT" in line]
        return Result(path.stem, refused=f"fails: {(lines or [f'exit status {done.returncode}'])[-1][:160]}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def table(tool: Path, tree: Path) -> list[str]:
    """The sweep as lines of Markdown; the models are written and thrown away one by one."""
    lines = [
        "| model | ratio 1, KL | after a cut, KL | ratio 0.3, KL | factor at 0.25 | or why not |",
        "|---|---|---|---|---|---|",
    ]
    for arch in architectures(tree):
        with tempfile.TemporaryDirectory() as folder:
            for path in write_models(tool, arch, Path(folder)):
                r = measure_apart(path)
                kls = ("" if kl is None else f"{kl:.1e}" for kl in (r.kl, r.kl_cut, r.kl_dropped))
                factor = "" if r.factor is None else f"{r.factor:.2f}"
                why = (r.refused or "").removeprefix("compressing the KV cache: ").split("; ")[0]
                lines.append(f"| {r.name} | {' | '.join((*kls, factor, why))} |")
                print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=Path, help="sweep one model and print JSON")
    parser.add_argument("--tool", type=Path, help="test-llama-archs")
    parser.add_argument("--tree", type=Path, help="llama.cpp")
    parser.add_argument("--write", type=Path, help="page whose table, between its two marks, is replaced")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(asdict(measure(args.one))))
        return
    lines = table(args.tool, args.tree)
    if args.write:
        begin, end = "<!-- table: begin -->\n", "<!-- table: end -->"
        head, rest = args.write.read_text(encoding="utf-8").split(begin)
        tail = rest.split(end)[1]
        args.write.write_text(f"{head}{begin}{chr(10).join(lines)}\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
