"""Settings of a measurement as words on the command line."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError


def parse_setting(text: str) -> tuple[str, dict[str, Any]]:
    """'semanticache:0.25', 'paper:0.125', 'semanticache:0.25:equal', '...:stage=1024', '...:type_k=q8_0', '...:merge=0', '...:horizon=2048'."""
    try:
        return text, _parse(text)
    except ValueError as error:
        raise ArgumentError(f"setting: expected METHOD:RATIO[:equal][:NAME=VALUE]..., got {text!r} ({error}); as in semanticache:0.25") from error


def _parse(text: str) -> dict[str, Any]:
    method, ratio, *options = text.split(":")
    kwargs: dict[str, Any] = {"kv_compress": method, "kv_ratio": float(ratio)}
    for option in options:
        if option == "equal":
            kwargs["kv_profile"] = None
            continue
        name, value = option.split("=")
        if name in ("horizon", "chunk", "merge", "seed"):
            name = name if name in ("merge", "seed") else f"n_{name}"
            kwargs.setdefault("kv_params", {})[name] = int(value)
        else:
            kwargs[f"kv_{name}"] = int(value) if value.isdigit() else value
    return kwargs
