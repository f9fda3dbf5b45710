"""Settings of a measurement as words on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import profile
from .._cpu import warn_of_threads
from ..config import METHODS, OURS, KVConfig
from ..errors import ArgumentError
from ..memory import CacheEstimate, estimate
from ..model_file import ModelFile
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
"""Presses of kvpress that `kvpress_worker` knows."""


def parse_press(text: str) -> tuple[str, float]:
    """Press and kept share of "kvpress:NAME:KEEP"."""
    try:
        kvpress, name, keep = text.split(":")
        if kvpress == "kvpress" and name in PRESSES and 0 < float(keep) <= 1:
            return name, float(keep)
    except ValueError:
        pass
    raise ArgumentError(
        f"setting: expected kvpress:NAME:KEEP with one of {', '.join(PRESSES)} and 0 < KEEP <= 1, got {text!r}; as in "
        "kvpress:keydiff:0.25"
    )


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
    configs.sort(key=lambda config: config.kv_profile == "auto")
    chosen = [profile.ensure(model, n_threads=threads, config=config) for config in configs]
    return list(dict.fromkeys(file for file in chosen if file is not None))
