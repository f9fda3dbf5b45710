"""What a model needs in memory, computed from the metadata of its GGUF file alone.

The sizes of the weights and of the KV cache follow llama.cpp's own allocation. The rest (compute buffer, the driver's
context on a GPU) is an estimate and says so. 1 GB is 1024^3 bytes here, 1 MiB is 1024^2.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from . import _native
from .config import OURS, KVConfig, parse_bytes
from .errors import ArgumentError
from .model_file import ModelFile
from .shape import LayerShape, ModelShape

GB = 1024**3
CARDS_GB = (6, 8, 12, 16, 24)  # memory of common consumer cards
CACHE_TYPES = ("f16", "q8_0", "q4_0", OURS)

N_CTX_MEASURED = 16384
"""Context size, tokens, up to which the loss of a compressed cache was measured (docs/results.md)."""

_BLOCK_BYTES = {"f16": 64, "q8_0": 34, "q5_0": 22, "q4_0": 18, "iq4_nl": 18}  # of 32 values
_N_CTX_PAD = 256  # llama.cpp rounds n_ctx and the cells of a sliding-window cache up to this
_BIAS_BYTES, _ORIGIN_BYTES = 2, 4  # of a row, besides K and V; a score comes on top
_F16_BYTES = 2  # of a value of a frame or a sink
_PADDING_BYTES = 10 * 32  # of a layer's tensors, at the most
_VOTES_BYTES = 8  # of a token in the stage, per kv head
_ASK_QUERIES = (OURS, "snapkv", "tova", "h2o")  # the other methods keep no queries
_DRIVER_BYTES = 300 << 20  # context of a GPU driver, estimated


@dataclass(frozen=True)
class CacheEstimate:
    """Memory for one kind of cache at one context size, bytes.

    Attributes
    ----------
    cache : str
        One of `CACHE_TYPES`.
    n_ctx : int
        Tokens, as asked for.
    core_bytes, stage_bytes, query_bytes, meta_bytes : int
        Compressed layers: K, V and bias of the cores, frames and sinks of the heads; K and V of the stage; its queries;
        scores and origins of the cores, votes on the stage.
    other_bytes : int
        Layers that are not compressed: all of them unless `cache` is "semanticache".
    work_bytes : int
        What passes work in on a card that computes them, at the most; no part of the cache.
    weights_bytes : int
    overhead_bytes : int
        Estimate: compute buffer for batches of 512 tokens with flash attention, and the driver's context.
    compression_factor : float
        f16 cache at this n_ctx divided by this one.
    """

    cache: str
    n_ctx: int
    core_bytes: int
    stage_bytes: int
    query_bytes: int
    meta_bytes: int
    other_bytes: int
    work_bytes: int
    weights_bytes: int
    overhead_bytes: int
    compression_factor: float

    @property
    def kv_bytes(self) -> int:
        """The whole cache."""
        return self.core_bytes + self.stage_bytes + self.query_bytes + self.meta_bytes + self.other_bytes

    @property
    def total_bytes(self) -> int:
        """Everything: cache, work, weights and overhead."""
        return self.kv_bytes + self.work_bytes + self.weights_bytes + self.overhead_bytes

    def fits(self, card_gb: float) -> bool:
        """Whether all of it fits into the memory of a card of `card_gb` GB (1024^3 bytes)."""
        return self.total_bytes <= card_gb * GB


@dataclass(frozen=True)
class MemoryReport:
    """Estimates for several context sizes and cards.

    Attributes
    ----------
    model : ModelShape
    kv_ratio : float
    kv_stage : int
    cards_gb : tuple of int
    estimates : tuple of CacheEstimate
        Ordered by n_ctx, then as in `CACHE_TYPES`; kinds that cannot be had are left out.
    max_n_ctx : dict
        max_n_ctx[cache][card_gb]: largest n_ctx that fits, at most n_ctx_train; 0 if none does.
    notes : tuple of str
        Kinds left out, and why.
    """

    model: ModelShape
    kv_ratio: float
    kv_stage: int
    cards_gb: tuple[int, ...]
    estimates: tuple[CacheEstimate, ...]
    max_n_ctx: dict[str, dict[int, int]]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields and totals, for JSON."""
        report = asdict(self)
        for entry, estimate in zip(report["estimates"], self.estimates, strict=True):
            entry["kv_bytes"] = estimate.kv_bytes
            entry["total_bytes"] = estimate.total_bytes
            entry["fits_gb"] = [card for card in self.cards_gb if estimate.fits(card)]
        return report


def estimate(
    shape: ModelShape,
    n_ctx: int,
    cache: str,
    *,
    n_ubatch: int = 512,
    swa_full: bool = False,
    **kv: Any,
) -> CacheEstimate:
    """Memory for one kind of cache.

    Parameters
    ----------
    shape : ModelShape
    n_ctx : int
        Context size, tokens.
    cache : str
        One of `CACHE_TYPES`. The first three are llama.cpp's own caches for all layers.
    n_ubatch : int
        Tokens computed at a time.
    swa_full : bool
        Keep all n_ctx tokens in sliding-window layers too, as llama_cpp.Llama does unless told otherwise.
    **kv
        kv_* arguments of `Llama`; used by "semanticache" only, which kv_compress is by default. Heads are taken to have
        equal budgets.

    Raises
    ------
    ArgumentError
        This cache cannot be had for this model or with these numbers.
    """
    if n_ctx < 1:
        raise ArgumentError(f"expected n_ctx >= 1, got {n_ctx}; give a number of tokens such as 8192")
    cells = _pad(n_ctx)
    cells_swa = cells if swa_full else _pad(min(cells, shape.n_swa + n_ubatch))
    full, swa = shape.of_kind("full"), shape.of_kind("swa")
    f16_bytes = _plain_bytes(full, cells, "f16") + _plain_bytes(swa, cells_swa, "f16")
    core = stage = query = meta = work = 0
    if cache == OURS:
        if shape.refused:
            raise ArgumentError(f"expected a model whose cache can be compressed, got one where {shape.refused}")
        config = KVConfig(**{"kv_compress": OURS, **kv})
        config.check()
        config.check_n_ctx(n_ctx)
        config = within_budget(config, shape, n_ctx, n_ubatch=n_ubatch, swa_full=swa_full)
        n_head_kv = shape.n_head_kv
        rows = config.rows_per_head(cells, n_head_kv)
        if not swa_full:  # a batch is no larger than what a pass makes room for
            cells_swa = _pad(min(cells, shape.n_swa + min(n_ubatch, config.n_ubatch)))
        kv_type_k, kv_type_v = (_type(full, kind, "iq4_nl") for kind in (config.kv_type_k, config.kv_type_v))
        core = round(
            rows
            * (_plain_bytes(full, 1, kv_type_k, "k") + _plain_bytes(full, 1, kv_type_v, "v") + _BIAS_BYTES * n_head_kv)
            + sum(layer.n_head_kv * _head_bytes(layer, config.kv_sink) for layer in full)
        )
        meta = round((rows * (_ORIGIN_BYTES + _score_bytes(config)) + config.kv_stage * _VOTES_BYTES) * n_head_kv)
        stage = _plain_bytes(full, config.kv_stage, _stage_type(shape, config.kv_type_stage))
        n_ring = config.n_room if config.kv_compress in _ASK_QUERIES else 0
        query = sum(_query_rows(n_ring) * (1 + layer.n_reader) * _query_row_bytes(layer) for layer in full)
        other = _plain_bytes(swa, cells_swa, "f16")
        kv_cells = config.kv_stage
        work = _work_bytes(config, full, cells) if config.kv_compress == OURS else 0
    else:
        other = _plain_bytes(full, cells, cache) + _plain_bytes(swa, cells_swa, cache)
        kv_cells = cells
    kv_bytes = core + stage + query + meta + other
    return CacheEstimate(
        cache=cache,
        n_ctx=n_ctx,
        core_bytes=core,
        stage_bytes=stage,
        query_bytes=query,
        meta_bytes=meta,
        other_bytes=other,
        work_bytes=work,
        weights_bytes=shape.weights_bytes,
        overhead_bytes=_compute_bytes(shape, kv_cells, n_ubatch) + _DRIVER_BYTES,
        compression_factor=f16_bytes / kv_bytes if kv_bytes else 1.0,
    )


def _work_bytes(config: KVConfig, layers: Sequence[LayerShape], n_ctx: int) -> int:
    k, v = (_type(layers, kind, "iq4_nl") for kind in (config.kv_type_k, config.kv_type_v))
    config = replace(config, kv_type_k=k, kv_type_v=v)
    return max(
        (
            _native.work_bytes(
                config,
                n_ctx,
                len(layers),
                layer.n_head_kv,
                layer.n_head * (1 + layer.n_reader) // layer.n_head_kv,
                layer.n_embd_head_k,
                layer.n_embd_head_v,
            )
            for layer in layers
        ),
        default=0,
    )


def within_budget(
    config: KVConfig, shape: ModelShape, n_ctx: int, *, on_card: bool = False, **options: Any
) -> KVConfig:
    """The settings with the largest kv_ratio whose whole cache, stage and sliding windows included, takes no more than
    kv_budget; as they are without one. Recurrent states of a hybrid model do not depend on n_ctx and are not counted.

    Parameters
    ----------
    config : KVConfig
    shape : ModelShape
    n_ctx : int
        Context size, tokens.
    on_card : bool
        The cache is on a card; if that computes passes, what they work in is counted.
    **options
        n_ubatch and swa_full, see `estimate`.

    Raises
    ------
    ArgumentError
        Not even the least number of rows fits; the message says what would.
    """
    if config.kv_budget is None:
        return config
    budget = parse_bytes(config.kv_budget)
    works = on_card and _native.passes_on_device(config)

    def with_ratio(ratio: float) -> KVConfig:
        return replace(config, kv_ratio=ratio, kv_budget=None)

    def kv_bytes(ratio: float) -> int:
        padding = _PADDING_BYTES * len(shape.of_kind("full"))
        size = estimate(shape, n_ctx, OURS, **options, **with_ratio(ratio).arguments())
        return size.kv_bytes + padding + works * size.work_bytes

    # the bytes of rows are in proportion to the ratio
    least = min(1.0, (config.kv_sink + config.n_chunk) / _pad(n_ctx) * (1 + 1e-6))
    at_least, at_most = kv_bytes(least), kv_bytes(1.0)
    if budget < at_least:
        raise ArgumentError(
            f"kv_budget: expected at least {-(-at_least // 2**20)} MiB at n_ctx {n_ctx}, for the stage and the least "
            f"number of rows, got {budget / 2**20:.1f} MiB; raise it, or lower n_ctx or kv_stage"
        )
    if budget >= at_most:
        return with_ratio(1.0)
    return with_ratio(least + (1 - least) * (budget - at_least) / (at_most - at_least))


def _type(layers: Sequence[LayerShape], kind: str, best: str) -> str:
    """What "auto" stands for: the best type where all heads are whole blocks of it."""
    if kind != "auto":
        return kind
    return "f16" if any(layer.n_embd_head_k % 32 or layer.n_embd_head_v % 32 for layer in layers) else best


def _stage_type(shape: ModelShape, kind: str) -> str:
    """What "auto" stands for: q8_0 where llama.cpp rotates its keys, which are of heads of a multiple of 64 values."""
    full = shape.of_kind("full")
    rotates = all(layer.n_embd_head_k % 64 == 0 for layer in (shape.layers[0], *full))
    return _type(full, kind, "q8_0" if rotates else "f16")


def _score_bytes(config: KVConfig) -> int:
    """Bytes of a row's score, f16 or, of the eviction methods of others, f32."""
    return 2 if config.kv_compress in (OURS, "paper", "streaming") else 4


def _head_bytes(layer: LayerShape, n_sink: int) -> int:
    """Bytes of what a KV head has besides its rows: mean and scale of its keys, K and V of the sinks, two counts."""
    return 8 + _F16_BYTES * (2 * layer.n_embd_head_k + n_sink * (layer.n_embd_head_k + layer.n_embd_head_v))


def _query_rows(n_ring: int) -> int:
    """Rows of the query ring: for every second token between two passes, and one to spare."""
    return (n_ring + 1) // 2 + 1


def _query_row_bytes(layer: LayerShape) -> int:
    """Bytes of one token in a layer's query ring: q5_0, or f16 where heads do not fill blocks."""
    n_embd = layer.n_head * layer.n_embd_head_k
    fills = layer.n_embd_head_k % 16 == 0 and n_embd % 32 == 0
    return n_embd * _BLOCK_BYTES["q5_0" if fills else "f16"] // 32


def _pad(n: int) -> int:
    return -(-n // _N_CTX_PAD) * _N_CTX_PAD


def _plain_bytes(layers: Sequence[LayerShape], cells: int, cache: str, parts: str = "kv") -> int:
    """Bytes of `cells` tokens' K and V, or of one of them, without anything else."""
    if cache not in _BLOCK_BYTES:
        raise ArgumentError(f"expected a cache of {', '.join(CACHE_TYPES)}, got {cache!r}")
    total = 0
    for layer in layers:
        for part, d in (("k", layer.n_embd_head_k), ("v", layer.n_embd_head_v)):
            if part not in parts:
                continue
            if cache != "f16" and d % 32:
                raise ArgumentError(
                    f"expected heads of a multiple of 32 values for {cache}, got {d} in layer {layer.il}"
                )
            total += cells * layer.n_head_kv * d * _BLOCK_BYTES[cache] // 32
    return total


def _compute_bytes(shape: ModelShape, kv_cells: int, n_ubatch: int) -> int:
    """Estimate of llama.cpp's compute buffer with flash attention: logits, activations, mask in f32 and f16."""
    per_token = 4 * (shape.n_vocab + 4 * shape.n_embd + 2 * shape.n_ff) + 6 * kv_cells
    return n_ubatch * per_token


def largest_n_ctx(shape: ModelShape, card_gb: float, cache: str, **options: Any) -> int:
    """Largest n_ctx, at most n_ctx_train, with which everything fits on a card; 0 if none does.

    Parameters
    ----------
    shape : ModelShape
    card_gb : float
        Memory of the card, GB of 1024^3 bytes.
    cache : str
        One of `CACHE_TYPES`.
    **options
        As in `estimate`.

    Raises
    ------
    ArgumentError
        This cache cannot be had at any n_ctx.
    """
    limit = shape.n_ctx_train or 1 << 20
    sizes = [*range(_N_CTX_PAD, limit, _N_CTX_PAD), limit]
    estimate(shape, limit, cache, **options)
    low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not
    while low < high:
        middle = (low + high) // 2
        try:
            fits = estimate(shape, sizes[middle], cache, **options).fits(card_gb)
        except ArgumentError:
            fits = True  # too short for the stage or for the budget: look among the longer ones
        low, high = (middle + 1, high) if fits else (low, middle)
    if low == 0:
        return 0
    try:
        estimate(shape, sizes[low - 1], cache, **options)
    except ArgumentError:
        return 0
    return sizes[low - 1]


def memory_report(
    model: str | os.PathLike[str],
    n_ctx: Sequence[int],
    *,
    cards_gb: Sequence[int] = CARDS_GB,
    swa_full: bool = False,
    **kv: Any,
) -> MemoryReport:
    """Estimates for a model file.

    Parameters
    ----------
    model : path
        GGUF file; only its metadata is read.
    n_ctx : sequence of int
        Context sizes, tokens.
    cards_gb : sequence of int
        Memory of the cards, GB of 1024^3 bytes.
    swa_full, **kv
        See `estimate`.

    Raises
    ------
    ModelFileError
        See `ModelFile`.
    ArgumentError
        A context size below 1.
    """
    shape = ModelFile.of(model).shape
    options = {"swa_full": swa_full, **kv}
    config = KVConfig(**{"kv_compress": OURS, **kv})
    estimates: list[CacheEstimate] = []
    largest: dict[str, dict[int, int]] = {}
    notes: dict[str, None] = {}  # ordered set
    for size in n_ctx:
        estimates.append(estimate(shape, size, "f16", **options))
        for cache in CACHE_TYPES[1:]:
            try:
                estimates.append(estimate(shape, size, cache, **options))
            except ArgumentError as error:
                notes[f"{cache}: {error}"] = None
    for cache in CACHE_TYPES:
        try:
            largest[cache] = {card: largest_n_ctx(shape, card, cache, **options) for card in cards_gb}
        except ArgumentError as error:
            notes[f"{cache}: {error}"] = None
    return MemoryReport(
        shape, config.ratio(shape.n_head_kv), config.kv_stage, tuple(cards_gb), tuple(estimates), largest, tuple(notes)
    )
