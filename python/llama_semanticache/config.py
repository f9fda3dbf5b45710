"""The settings of a compressed cache: defaults, checks, and which profile they call for. Loads no library."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError

if TYPE_CHECKING:
    from .model_file import ModelFile

OURS = "semanticache"

METHODS = {
    OURS: "SEMANTIC",
    "paper": "PAPER",
    "streaming": "STREAMING",
    "keydiff": "KEYDIFF",
    "knorm": "KNORM",
    "snapkv": "SNAPKV",
    "tova": "TOVA",
    "h2o": "H2O",
}
"""Values of kv_compress, and what follows SEMCACHE_METHOD_ in semcache.h."""

AUTO = "auto"
"""Value of kv_compress that stands for OURS where the model allows it and the cache gets smaller, else for None."""

ROW_TYPES = ("auto", "f16", "q8_0", "q5_0", "q4_0", "iq4_nl")
"""Values of kv_type_k and kv_type_v."""

STAGE_TYPES = ("auto", "f16", "q8_0")
"""Values of kv_type_stage."""

PARAMS = ("n_horizon", "n_chunk", "merge", "distinct", "seed", "calibrate")
"""Names that kv_params may have."""

N_CHUNK = 32
"""The library's own default of n_chunk, tokens."""

N_HEAD_KV_FEW = 8
"""Models with fewer compressed KV heads than these have none to take rows from: they do better with equal budgets, and
keep their facts only with all rows (docs/decisions.md, 45 and 50). Measured with 3 and with 48; between is a guess.
"""

RATIO = 0.25
"""What kv_ratio None stands for, but for models of few heads: they keep all rows."""

MAX_ROOM = 4096
"""SEMCACHE_MAX_ROOM: tokens that a pass may compress at once."""


_UNITS = {"": 1, **{f"{k}B": 1000**i for i, k in enumerate(("", "K", "M", "G"))}}
_UNITS.update({f"{k}iB": 1024**i for i, k in enumerate(("K", "M", "G"), start=1)})


def parse_bytes(value: object) -> int:
    """A number of bytes, or a text with a unit or without: "512MiB", "1.5 GB".

    Raises
    ------
    ArgumentError
        It is neither, or not more than 0.
    """
    n_bytes = 0.0
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMG]?i?B|)\s*", value)
        if found and found[2] in _UNITS:
            n_bytes = float(found[1]) * _UNITS[found[2]]
    elif not isinstance(value, bool) and isinstance(value, numbers.Real):
        n_bytes = float(value)
    if not 1 <= n_bytes < math.inf:
        raise ArgumentError(
            f"kv_budget: expected a number of bytes, or one with KB, MB, GB, KiB, MiB or GiB, got {value!r}; pass "
            'for instance "512MiB"'
        )
    return int(n_bytes)


@dataclass(frozen=True)
class KVConfig:
    """All kv_* arguments of `Llama`, which documents them. Anything may be in here until `check` has been called."""

    kv_compress: str | None = None
    kv_ratio: float | None = None
    kv_stage: int = 384
    kv_window: int = 256
    kv_sink: int = 4
    kv_type_k: str = "auto"
    kv_type_v: str = "auto"
    kv_type_stage: str = "auto"
    kv_profile: str | os.PathLike[str] | None = "auto"
    kv_params: Mapping[str, int] | None = None
    kv_budget: float | str | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `Llama`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def changed(self) -> list[str]:
        """Names of what has another value than the default."""
        return sorted(field.name for field in fields(self) if getattr(self, field.name) != field.default)

    @property
    def n_chunk(self) -> int:
        """Longest chunk, tokens: no KV head gets fewer rows than this and kv_sink."""
        return (self.kv_params or {}).get("n_chunk", N_CHUNK)

    @property
    def n_room(self) -> int:
        """Tokens that a pass makes room for, about, and comes after."""
        return self.kv_stage - self.kv_window

    @property
    def n_ubatch(self) -> int:
        """Tokens that are computed at a time at the most: a pass frees that many at the least."""
        return self.kv_stage - max(self.kv_window, self.kv_sink)

    def check(self) -> None:
        """Check what can be said without a model; what depends on one is checked by the library too.

        Raises
        ------
        ArgumentError
            A value is of another kind, out of range, or contradicts another one.
        """
        choices_of = {
            "kv_compress": METHODS,
            "kv_type_k": ROW_TYPES,
            "kv_type_v": ROW_TYPES,
            "kv_type_stage": STAGE_TYPES,
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in tuple(choices):
                one_of = "None or one of" if name == "kv_compress" else "one of"
                raise ArgumentError(
                    f"{name}: expected {one_of} {', '.join(choices)}, got {getattr(self, name)!r}; pass one of these"
                )
        ratio: Any = self.kv_ratio
        if ratio is not None and (not isinstance(ratio, numbers.Real) or not 0 < float(ratio) <= 1):
            raise ArgumentError(
                f"kv_ratio: expected 0 < kv_ratio <= 1, got {ratio!r}; 0.25 keeps a quarter of the rows"
            )
        if self.kv_budget is not None:
            parse_bytes(self.kv_budget)
            if ratio is not None:
                raise ArgumentError(
                    f"kv_budget: expected no kv_ratio beside it, got {ratio!r}; leave one of the two out"
                )
        for name, least in (("kv_sink", 0), ("kv_window", 1), ("kv_stage", 2)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or not least <= int(value) < 2**31:
                raise ArgumentError(
                    f"{name}: expected an integer of at least {least}, got {value!r}; the default fits most uses"
                )
        self._check_stage()
        unknown = set(self.kv_params or ()) - set(PARAMS)
        if unknown:
            raise ArgumentError(
                f"kv_params: expected {', '.join(PARAMS)}, got {', '.join(sorted(unknown))}; leave the others out"
            )
        n_chunk: Any = self.n_chunk
        if not isinstance(n_chunk, numbers.Integral) or not 1 <= int(n_chunk) <= 255:
            raise ArgumentError(f"kv_params: expected n_chunk of 1 to 255, got {n_chunk!r}; the default is {N_CHUNK}")

    def _check_stage(self) -> None:
        if self.n_room <= self.kv_sink:
            raise ArgumentError(
                f"kv_stage: expected more than kv_window + kv_sink = {self.kv_window + self.kv_sink}, got "
                f"{self.kv_stage}; raise kv_stage or lower kv_window"
            )
        if self.n_room > MAX_ROOM and not (self.kv_params or {}).get("calibrate"):  # which has no pass
            raise ArgumentError(
                f"kv_stage: expected at most kv_window + {MAX_ROOM} = {self.kv_window + MAX_ROOM}, got "
                f"{self.kv_stage}; lower kv_stage or raise kv_window"
            )

    def check_n_ctx(self, n_ctx: Any) -> None:
        """Check a context size, tokens; 0 stands for the model's own.

        Raises
        ------
        ArgumentError
            It is no number, or has no room for the stage.
        """
        if not isinstance(n_ctx, numbers.Integral):
            raise ArgumentError(f"n_ctx: expected an integer, got {n_ctx!r}; 0 takes the model's own")
        if 0 < int(n_ctx) < self.kv_stage:
            raise ArgumentError(
                f"n_ctx: expected at least kv_stage = {self.kv_stage}, got {n_ctx}; raise n_ctx or lower kv_stage"
            )

    def rows_per_head(self, n_ctx: int, n_head_kv: int) -> float:
        """Rows for older tokens that a compressed KV head has, on average.

        Parameters
        ----------
        n_ctx : int
            Context size, tokens, as the library rounds it up.
        n_head_kv : int
            Compressed KV heads of all layers.

        Raises
        ------
        ArgumentError
            They do not hold the sinks and a chunk.
        """
        ratio = self.ratio(n_head_kv)
        rows = round(ratio * n_ctx * n_head_kv)
        if rows < min(n_ctx, self.kv_sink + self.n_chunk) * n_head_kv:
            raise ArgumentError(
                f"kv_ratio: expected at least {self.kv_sink + self.n_chunk} rows per kv head, got "
                f"{rows / n_head_kv:.0f} from kv_ratio {ratio} and n_ctx {n_ctx}; raise one of them"
            )
        return rows / n_head_kv

    def ratio(self, n_head_kv: int) -> float:
        """kv_ratio of a model of which so many KV heads are compressed."""
        if self.kv_ratio is not None:
            return float(self.kv_ratio)
        return 1.0 if self.kv_compress == OURS and n_head_kv < N_HEAD_KV_FEW else RATIO

    def has_too_few_heads(self, n_head_kv: int) -> bool:
        """Whether heads are to take rows from one another, but too few heads, `n_head_kv`, are compressed.

        Methods of others have equal budgets; at kv_ratio 1 every head keeps everything.
        """
        return self._shares_rows(n_head_kv) and n_head_kv < N_HEAD_KV_FEW

    def decides_by_own_profile(self, model: ModelFile) -> bool:
        """Whether the model's own profile says which head gets how many rows: what kv_profile "auto" stands for."""
        if self.kv_profile != "auto":
            return False
        n_head_kv = model.shape.n_head_kv
        return self._shares_rows(n_head_kv) and n_head_kv >= N_HEAD_KV_FEW

    def _shares_rows(self, n_head_kv: int) -> bool:
        return self.kv_compress == OURS and self.ratio(n_head_kv) < 1
