"""Settings of a measurement as words on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import profile
from .._cpu import warn_of_threads
from ..config import METHODS, OURS, KVConfig
from ..errors import ArgumentError
from ..memory import CacheEstimate, estimate
from ..model_file import ModelFile
from ..reference.profile import budgets, read_profile
from ..shape import ModelShape

BASE = "stock:f16"
STOCK = {BASE: "f16", "stock:q8_0": "q8_0", "stock:q4_0": "q4_0"}
"""llama.cpp's own caches: the type of K and V by setting."""


DEFAULT_SETTINGS = ("semanticache:0.25", "semanticache:0.125", "paper:0.3", "streaming:0.3")
"""The peers hold no queries, so that 0.3 of theirs are about the bytes of our 0.25."""

PARAMS = {"horizon": "n_horizon", "chunk": "n_chunk", "merge": "merge", "distinct": "distinct", "seed": "seed"}
"""Options that are `kv_params` of `Llama`, and their names there."""

OPTIONS = ("stage", "window", "sink", "type_k", "type_v", "type_stage", "profile", *PARAMS)

PRESSES = ("keydiff", "knorm", "expected-attention", "snapkv", "tova", "streaming", "adakv", "kvzip")
"""Presses of kvpress that `transformers_worker` knows."""

MATCHING = "attention-matching"


@dataclass(frozen=True)
class Peer:
    """A method that runs in transformers."""

    name: str  # of a press, or MATCHING
    keep: float  # share of the rows
    equal: bool = True  # heads have the same budgets, instead of those by the model's profile


def is_peer(setting: str) -> bool:
    """Whether a setting runs in transformers."""
    return setting.split(":")[0] in ("kvpress", MATCHING)


def parse_peer(text: str) -> Peer:
    """What "kvpress:NAME:KEEP" or "attention-matching:KEEP[:equal]" means."""
    kind, *words = text.split(":")
    try:
        if kind == "kvpress":
            name, keep = words
            peer = Peer(name, float(keep))
            known = name in PRESSES
        else:
            keep, *options = words
            peer = Peer(MATCHING, float(keep), equal=bool(options))
            known = options in ([], ["equal"])
        if known and 0 < peer.keep <= 1:
            return peer
    except ValueError:
        pass
    raise ArgumentError(
        f"setting: expected kvpress:NAME:KEEP with one of {', '.join(PRESSES)}, or {MATCHING}:KEEP[:equal], and 0 < "
        f"KEEP <= 1, got {text!r}; as in kvpress:keydiff:0.25"
    )


def check_peer(model: ModelFile, setting: str) -> None:
    """Says what is wrong with a setting that runs in transformers. Raises ArgumentError."""
    if parse_peer(setting).name == MATCHING and any(layer.kind != "full" for layer in model.shape.layers):
        raise ArgumentError(
            f"{setting}: expected a model whose layers all attend to the whole text, got {model.name}; name another"
        )


def peer_rows(model: ModelFile, peer: Peer, n_tokens: int) -> list[list[int]]:
    """Rows of each kv head, by layer, that Attention Matching keeps of a text."""
    shape, config = model.shape, _config_of(peer)
    rows = np.full(shape.n_head_kv, round(peer.keep * n_tokens))
    if (file := profile.ensure(model, config=config)) is not None:
        rows = budgets(read_profile(file), peer.keep, n_tokens, config.kv_sink)
    ends = np.cumsum([layer.n_head_kv for layer in shape.layers])
    return [part.tolist() for part in np.split(rows, ends[:-1])]


def _config_of(peer: Peer) -> KVConfig:
    """A cache of ours with the same budgets."""
    return KVConfig(OURS, kv_profile=None if peer.equal else "auto")


def parse_setting(text: str) -> dict[str, Any]:
    """Arguments of `Llama` for one of our settings: 'semanticache:0.25', 'paper:0.125', 'semanticache:0.25:equal',
    '...:stage=1024', '...:type_k=q8_0', '...:merge=0', '...:distinct=0', '...:horizon=2048', '...:profile=FILE'.
    """
    try:
        return _parse(text)
    except ValueError as error:
        raise ArgumentError(
            f"setting: expected one of {', '.join(STOCK)} or METHOD:RATIO[:equal][:NAME=VALUE]..., got {text!r} "
            f"({error}); as in semanticache:0.25"
        ) from error


def _parse(text: str) -> dict[str, Any]:
    method, ratio, *options = text.split(":")
    if method not in METHODS:
        raise ValueError(f"no method of the name {method}")
    kwargs: dict[str, Any] = {"kv_compress": method, "kv_ratio": float(ratio)}
    for option in options:
        if option == "equal":
            kwargs["kv_profile"] = None
            continue
        name, value = option.split("=")
        if name not in OPTIONS:
            raise ValueError(f"no option of the name {name}, but {', '.join(OPTIONS)}")
        if name in PARAMS:
            kwargs.setdefault("kv_params", {})[PARAMS[name]] = int(value)
        else:
            kwargs[f"kv_{name}"] = int(value) if name in ("stage", "window", "sink") else value
    return kwargs


def llama_options(setting: str) -> dict[str, Any]:
    """Arguments of `Llama` for any setting."""
    if setting not in STOCK:
        return parse_setting(setting)
    import llama_cpp

    kind = getattr(llama_cpp, f"GGML_TYPE_{STOCK[setting].upper()}")
    return {"type_k": kind, "type_v": kind}


def estimated(shape: ModelShape, n_ctx: int, setting: str) -> CacheEstimate:
    """Memory of a setting that names no kvpress.

    Raises
    ------
    ArgumentError
        The model cannot have this cache, or not with these numbers.
    """
    if setting in STOCK:
        return estimate(shape, n_ctx, STOCK[setting])
    return estimate(shape, n_ctx, OURS, **parse_setting(setting))


def check_settings(model: ModelFile, settings: Iterable[str], n_ctx: int) -> None:
    """Says what is wrong with any of them before the first is measured.

    Raises
    ------
    ArgumentError
        As `estimated`.
    """
    for setting in settings:
        try:
            estimated(model.shape, n_ctx, setting)
        except ArgumentError as error:
            raise ArgumentError(f"{setting}: {error}") from error


def with_base(settings: Iterable[str], left_out: bool = False) -> list[str]:
    """llama.cpp's f16 cache, which all are compared with, unless another run has it, and then the others, each once."""
    return list(dict.fromkeys([*([] if left_out else [BASE]), *settings]))


def context_options(n_ctx: int, threads: int | None, n_gpu_layers: int) -> dict[str, Any]:
    """Arguments of `Llama` that are the same for every setting."""
    if threads is not None:
        warn_of_threads(threads)
    return dict(
        n_ctx=n_ctx,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=n_gpu_layers,
        flash_attn=True,
        swa_full=False,
        verbose=False,
    )


def profiles_of(model: ModelFile, settings: Iterable[str], threads: int | None) -> list[Path]:
    """The profiles that they decide by; the model's own is measured if it is missing and there is use for one.

    Raises
    ------
    ProfileError
        One names a file that is none; nothing was measured.
    """
    configs = [KVConfig(**parse_setting(s)) for s in settings if s.split(":")[0] in METHODS]
    configs += [_config_of(parse_peer(s)) for s in settings if is_peer(s)]
    configs.sort(key=lambda config: config.kv_profile == "auto")
    chosen = [profile.ensure(model, n_threads=threads, config=config) for config in configs]
    return list(dict.fromkeys(file for file in chosen if file is not None))
