"""The way over a card, on one made of the CPU (tests/card), and over Metal, whose Apple side is (tests/metal): nobody
but their backends can touch their memory.

Each test is a function of this file that runs in a process of its own, since a backend cannot be taken out again.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from conftest import EXACT, PASSES, built_by_make, kl, random_tokens, register_backend
from llama_semanticache import ArgumentError, Llama, StateError
from llama_semanticache.memory import estimate
from llama_semanticache.model_file import ModelFile

GB = 1 << 30
OPTIONS = dict(n_ctx=512, **PASSES, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
TOKENS = random_tokens(300)


class Card:
    """The card made of the CPU."""

    name, variable, register = "card", "LLAMA_SEMANTICACHE_CARD", "card_reg"

    def __init__(self, n_bytes: int = GB, most_work: int = GB, with_matrix_units: bool = False) -> None:
        self.set_up(n_bytes, ctypes.c_int64(most_work), ctypes.c_bool(with_matrix_units))

    def set_up(self, n_bytes: int, *options: ctypes._SimpleCData) -> None:
        self.lib = ctypes.CDLL(os.environ[self.variable])
        for name in ("allocated", "attended", "passed"):
            getattr(self.lib, f"{self.name}_{name}").restype = ctypes.c_int64
        getattr(self.lib, f"{self.name}_set")(ctypes.c_size_t(n_bytes), *options)
        register_backend(self.lib, self.register)

    def _count(self, name: str) -> int:
        return getattr(self.lib, f"{self.name}_{name}")()

    @property
    def allocated(self) -> int:
        """Bytes."""
        return self._count("allocated")

    @property
    def passed(self) -> int:
        """Nodes of passes so far."""
        return self._count("passed")

    @property
    def attended(self) -> int:
        return self._count("attended")


class Metal(Card):
    """llama.cpp's Metal backend and ours over Apple's side made of the CPU, which compiles kernels or does not."""

    name, variable, register = "metal", "LLAMA_SEMANTICACHE_METAL", "ggml_backend_metal_reg"

    def __init__(self, n_bytes: int = GB, compiles: bool = True) -> None:
        self.set_up(n_bytes, ctypes.c_bool(compiles))


def model(folder: Path, arch: str = "llama", **options) -> str:
    shape = dict(n_head=4, n_head_kv=2, n_embd_head=64)
    return str(tiny_models.write_tiny(folder / f"{arch}.gguf", arch, **{**shape, **options}))


def read(path: str, tokens=TOKENS, **options) -> tuple[Llama, np.ndarray]:
    llm = Llama(path, **{**OPTIONS, **options})
    llm.eval(tokens)
    return llm, llm.scores[: len(tokens)].copy()


# ---- in a process of its own


def exact_rows_are_the_cpus(folder: Path, device: type[Card]) -> None:
    """Merged, dropped and attended to as by the CPU, to float32; the card holds what kv_stats() says."""
    path, card = model(folder), device()
    cpu, want = read(path, **EXACT)
    empty = card.allocated
    llm, got = read(path, **EXACT, n_gpu_layers=-1)
    assert card.passed == llm.kv_stats().n_pass >= 3 and card.attended > 0
    np.testing.assert_allclose(got, want, atol=2e-3)
    stats, other = llm.kv_stats(), cpu.kv_stats()
    assert (stats.rows_merged, stats.rows_dropped) == (other.rows_merged, other.rows_dropped)
    assert stats.rows_merged > 100 and llm.kv_rows() == cpu.kv_rows()
    padding = 2 * 10 * 128  # of the tensors of two layers, at the most
    assert 0 <= stats.total_bytes - stats.work_bytes - other.total_bytes <= padding
    assert other.work_bytes == 0 < stats.work_bytes
    weights_and_graph = Path(path).stat().st_size + (64 << 20)
    assert stats.total_bytes <= card.allocated - empty < stats.total_bytes + weights_and_graph


def quantized_rows_are_nearly_the_cpus(folder: Path, device: type[Card]) -> None:
    """Rounding flips some choices between rows that are worth about as much."""
    path, card = model(folder), device()
    _, want = read(path)
    llm, got = read(path, n_gpu_layers=-1, verbose=True)
    assert card.passed == llm.kv_stats().n_pass >= 3
    divergence = kl(want, got)
    assert divergence.mean() < 5e-3, divergence.mean()
    llm.close()  # says whether memory was moved


def matrix_units_are_nearly_the_cpus(folder: Path, device: type[Card]) -> None:
    """Queries and shares in f16: other choices where rows are worth about as much, the same predictions."""
    path, card = model(folder), Card(with_matrix_units=True)
    _, want = read(path)
    llm, got = read(path, n_gpu_layers=-1)
    assert llm.kv_stats().n_pass >= 3 and card.attended > 0
    divergence = kl(want, got)
    assert divergence.mean() < 5e-3, divergence.mean()
    few = read(path, TOKENS[:40], n_gpu_layers=-1, n_ubatch=8)[1]  # of few queries: float32
    assert not np.array_equal(got[:40], few)


def a_state_is_the_same_on_the_card(folder: Path, device: type[Card]) -> None:
    """Saved on a card and restored to it, and to the CPU; cut; emptied."""
    path, card = model(folder), device()
    llm, _ = read(path, **EXACT, n_gpu_layers=-1)
    assert card.passed > 0
    state, rows = llm.save_state(), llm.kv_rows()
    more = random_tokens(60, seed=1)
    llm.eval(more)
    want = llm.scores[len(TOKENS) : len(TOKENS) + len(more)].copy()
    llm.load_state(state)
    assert llm.kv_rows() == rows
    llm.eval(more)
    np.testing.assert_allclose(llm.scores[len(TOKENS) : len(TOKENS) + len(more)], want, atol=1e-6)

    cpu, _ = read(path, tokens=TOKENS[:10], **EXACT)
    cpu.load_state(state)
    assert cpu.kv_rows() == rows
    cpu.eval(more)
    np.testing.assert_allclose(cpu.scores[len(TOKENS) : len(TOKENS) + len(more)], want, atol=2e-3)

    for each in (llm, cpu):
        each.load_state(state)
        each.n_tokens = each._floor(200)
        assert each._ctx.kv_cache_seq_rm(-1, each.n_tokens, -1)
    assert 0 < llm.n_tokens == cpu.n_tokens <= 200 and llm.kv_rows() == cpu.kv_rows() != rows
    llm.reset()
    llm.eval(TOKENS[:50])
    assert sum(used for *_, used in llm.kv_rows()) == 0 and llm.kv_stats().n_tokens == 50


def layers_lie_where_they_are_computed(folder: Path, device: type[Card]) -> None:
    """Of three layers two on the card: a pass of each kind, and the same logits."""
    path, card = model(folder, n_layer=3), device()
    cpu, want = read(path, **EXACT)
    llm, got = read(path, **EXACT, n_gpu_layers=3)  # the output counts as one
    assert card.passed == llm.kv_stats().n_pass >= 3
    np.testing.assert_allclose(got, want, atol=2e-3)
    assert llm.kv_rows() == cpu.kv_rows()


def passes_are_the_cpus(card: Card, path: str, **options) -> None:
    cpu, want = read(path, **{**EXACT, **options})
    llm, got = read(path, **{**EXACT, **options}, n_gpu_layers=-1)
    assert llm.kv_stats().n_pass >= 3 and llm.kv_stats().work_bytes == 0 and llm.kv_rows() == cpu.kv_rows()
    np.testing.assert_allclose(got, want, atol=2e-3)
    assert card.passed == 0 < card.attended


def a_card_without_passes_has_them_computed(folder: Path, device: type[Card]) -> None:
    """Its rows are copied to the CPU for them."""
    passes_are_the_cpus(Card(most_work=-1), model(folder))


def passes_too_large_for_a_card_are_the_cpus(folder: Path, device: type[Card]) -> None:
    """As for a Vulkan device, whose kernels see no more of a buffer than it says."""
    passes_are_the_cpus(Card(most_work=1 << 16), model(folder))


def passes_by_the_methods_of_others_are_the_cpus(folder: Path, device: type[Card]) -> None:
    """For which no card has kernels."""
    passes_are_the_cpus(device(), model(folder), kv_compress="keydiff")


def what_the_kernels_do_not_compute_stays_with_the_cpu(folder: Path, device: type[Card]) -> None:
    """Heads of 16, and a cache that is to stay in host memory: the CPU's results to the bit."""
    card = device()
    small, large = model(folder, n_embd_head=16), model(folder, "qwen3", n_embd_head=64)
    for path, options in (
        (small, {}),
        (large, dict(offload_kqv=False)),
        (large, dict(flash_attn=False)),
    ):
        _, want = read(path, **options)
        llm, got = read(path, **options, n_gpu_layers=-1)
        assert llm.kv_stats().n_pass >= 3 and llm.kv_stats().work_bytes == 0
        np.testing.assert_array_equal(got, want)
    assert card.passed == card.attended == 0


def a_pass_that_did_not_run_is_an_error(folder: Path, device: type[Card]) -> None:
    """A device may stop what takes too long and say nothing: no token leaves the stage for it."""
    path, card = model(folder), Card()
    llm, _ = read(path, TOKENS[:60], n_gpu_layers=-1)
    card.lib.card_lose_passes()
    with pytest.raises(StateError, match=r"expected its kernels to run on Card, got other counts; .* clear the cache"):
        llm.eval(TOKENS[60:200])
    assert llm.kv_stats().n_pass == 0 and llm.kv_stats().n_tokens_stage >= 60
    llm.reset()
    llm.eval(TOKENS[:60])
    assert llm.kv_stats().n_tokens == 60


def kernels_that_do_not_compile_leave_it_to_the_cpu(folder: Path, device: type[Card]) -> None:
    """On a device that refuses their source the cache stays where it was: slower, not wrong."""
    metal, path = Metal(compiles=False), model(folder)
    _, want = read(path)
    llm, got = read(path, n_gpu_layers=-1)
    assert llm.kv_stats().n_pass >= 3 and llm.kv_stats().work_bytes == 0
    np.testing.assert_allclose(got, want, atol=2e-3)
    assert metal.passed == metal.attended == 0


def memory_is_counted_before_it_is_taken(folder: Path, device: type[Card]) -> None:
    """A budget holds on a card too, where passes have memory of their own; "auto" says no where that is too much."""
    path, card = model(folder, n_layer=8), device()
    shape = ModelFile.of(path).shape
    options = dict(n_ctx=2048, kv_stage=192, kv_window=64)
    for kv_ratio in (0.1, 0.25, 1.0):
        llm, _ = read(path, TOKENS[:10], **options, kv_ratio=kv_ratio, n_gpu_layers=-1)
        foreseen = estimate(shape, 2048, "semanticache", kv_stage=192, kv_window=64, kv_ratio=kv_ratio)
        stats = llm.kv_stats()
        assert 0 < stats.work_bytes <= foreseen.work_bytes < 1.5 * stats.work_bytes + (8 << 20)
        assert foreseen.kv_bytes == pytest.approx(stats.total_bytes - stats.work_bytes, rel=0.02)
        llm.close()
    budget = foreseen.work_bytes + (3 << 20)
    llm, _ = read(path, TOKENS[:10], **options, kv_ratio=None, kv_budget=budget, n_gpu_layers=-1)
    assert llm.kv_stats().total_bytes <= budget and llm.kv_stats().rows_allocated > 8 * 2 * 192
    least = (foreseen.work_bytes >> 20) + 1
    with pytest.raises(ArgumentError, match=f"expected at least ({least}|{least + 1}) MiB"):
        read(path, TOKENS[:10], **options, kv_ratio=None, kv_budget="2MiB", n_gpu_layers=-1)
    llm.close()
    llm, _ = read(path, TOKENS[:10], **{**options, "kv_compress": "auto"}, n_gpu_layers=-1)
    assert llm.kv_stats().kv_compress is None and "MiB" in llm.kv_stats().why_uncompressed
    assert card.passed == 0


def a_card_that_is_full_is_an_error(folder: Path, device: type[Card]) -> None:
    """At loading, before anything is read."""
    path = model(folder)
    n_weights = Path(path).stat().st_size
    device(n_weights + (64 << 10))
    with pytest.raises(StateError, match=r"expected \d+ MiB in .*, got none; lower n_ctx or the ratio"):
        read(path, n_gpu_layers=-1, n_ctx=4096)


CHECKS = [
    *[
        (device, check)
        for device in (Card, Metal)
        for check in (
            exact_rows_are_the_cpus,
            quantized_rows_are_nearly_the_cpus,
            a_state_is_the_same_on_the_card,
            layers_lie_where_they_are_computed,
            passes_by_the_methods_of_others_are_the_cpus,
            a_card_that_is_full_is_an_error,
        )
    ],
    (Card, matrix_units_are_nearly_the_cpus),
    (Card, a_card_without_passes_has_them_computed),
    (Card, a_pass_that_did_not_run_is_an_error),
    (Card, passes_too_large_for_a_card_are_the_cpus),
    (Card, what_the_kernels_do_not_compute_stays_with_the_cpu),
    (Card, memory_is_counted_before_it_is_taken),
    (Metal, kernels_that_do_not_compile_leave_it_to_the_cpu),
]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the card's fibers and its memory are Linux'")
@pytest.mark.parametrize("device, check", CHECKS, ids=lambda x: x.__name__)
def test_on_the_card(device, check, tmp_path):
    built_by_make(device.variable, f"the device of tests/{device.name}")
    command = [sys.executable, "-W", "ignore::UserWarning", __file__, device.__name__, check.__name__, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, re.sub(r"\n{2,}", "\n", done.stdout + done.stderr)[-4000:]
    # memory is reserved for the largest graph: none is moved while a card computes
    if check is quantized_rows_are_nearly_the_cpus:
        assert "matches expectation" in done.stderr and "does not match expectation" not in done.stderr


if __name__ == "__main__":
    device_name, check_name, folder = sys.argv[1:]
    device, check = next(
        (device, check) for device, check in CHECKS if (device.__name__, check.__name__) == (device_name, check_name)
    )
    check(Path(folder), device)
