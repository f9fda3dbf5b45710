"""What the metadata of a GGUF file says about the attention of a model, as llama.cpp reads it; the model is not
loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _native
from .errors import ModelFileError

if TYPE_CHECKING:
    from ._gguf import TensorInfo

_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_MAX_NUMBER = 2**31 - 1
_RECURRENT = ("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7")
# Every how many layers one has full attention, where the file does not say it; negative: the first of them, else the
# last.
_SWA_PERIOD = {
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "cohere2": 4,
    "exaone4": 4,
    "gpt-oss": 2,
    "olmo2": 4,
    "plamo3": 8,
    "smallthinker": -4,
}
_SWA_DEFAULT = {"gemma2": 4096, "exaone4": 4096}  # tokens, where the file does not say it
_HYBRID_PERIOD = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4}  # every how many layers one is not recurrent


@dataclass(frozen=True)
class LayerShape:
    """Attention of one layer.

    Attributes
    ----------
    il : int
        Layer.
    kind : {"full", "swa", "none"}
        Full attention, sliding window, or no KV cache of its own (recurrent, or shared with another layer).
    n_head, n_head_kv : int
        Query heads, kv heads.
    n_embd_head_k, n_embd_head_v : int
        Values per key and per value; n_embd_head_v is 0 where no value is cached (MLA).
    n_reader : int
        Later layers without K and V of their own that attend to this one's (Gemma 3n, Gemma 4).
    """

    il: int
    kind: str
    n_head: int
    n_head_kv: int
    n_embd_head_k: int
    n_embd_head_v: int
    n_reader: int = 0


@dataclass(frozen=True)
class ModelShape:
    """What the metadata says about a model.

    Attributes
    ----------
    path, name, arch : str
        File, general.name, general.architecture.
    n_ctx_train, n_embd, n_ff, n_vocab, n_swa : int
        n_swa is the sliding window in tokens, 0 if there is none.
    weights_bytes : int
        All tensors.
    layers : tuple of LayerShape
    refused : str or None
        Why the cache cannot be compressed, as far as the metadata tells.
    """

    path: str
    name: str
    arch: str
    n_ctx_train: int
    n_embd: int
    n_ff: int
    n_vocab: int
    n_swa: int
    weights_bytes: int
    layers: tuple[LayerShape, ...]
    refused: str | None

    def of_kind(self, kind: str) -> list[LayerShape]:
        """Layers of one kind."""
        return [layer for layer in self.layers if layer.kind == kind]

    @property
    def n_head_kv(self) -> int:
        """KV heads that are compressed: those of the layers with full attention."""
        return sum(layer.n_head_kv for layer in self.of_kind("full"))


def shape_of(path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> ModelShape:
    """What the header of a model says.

    Parameters
    ----------
    path : Path
        Of the model, for errors.
    metadata : mapping
        Numbers, texts, and arrays of numbers as lists.
    tensors : sequence of TensorInfo
        Of all files.

    Raises
    ------
    ModelFileError
        The metadata is not that of a language model, or has values that none can have.
    """
    meta = _Metadata(path, metadata)
    n_block = meta.need("block_count", _MAX_LAYERS)
    n_layer = n_block - meta.number("nextn_predict_layers", 0)
    n_embd = meta.need("embedding_length", _MAX_NUMBER)
    n_head = meta.per_layer("attention.head_count", n_block, [0] * n_block)
    n_head_kv = meta.per_layer("attention.head_count_kv", n_block, n_head)
    head = n_embd // n_head[0] if n_head[0] else 0
    d_k, d_v = meta.number("attention.key_length", head), meta.number("attention.value_length", head)
    d_k_swa, d_v_swa = meta.number("attention.key_length_swa", d_k), meta.number("attention.value_length_swa", d_v)
    mla = meta.number("attention.key_length_mla", 0) > 0
    n_swa, swa = _sliding_window(meta, n_layer)
    cached = _cached_layers(meta, n_layer, n_head_kv)

    layers = []
    for il in range(n_layer):
        kind = "none" if not cached[il] else "swa" if swa[il] else "full"
        k, v = (d_k_swa, d_v_swa) if swa[il] else (d_k, d_v)
        n_kv = n_head_kv[il] if cached[il] else 0
        readers = _readers(meta, il, n_layer, swa)
        layers.append(LayerShape(il, kind, n_head[il], n_kv, k, 0 if mla else v, readers))

    embedding = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    return ModelShape(
        path=str(path),
        name=str(metadata.get("general.name", "")),
        arch=meta.arch,
        n_ctx_train=meta.number("context_length", 0),
        n_embd=n_embd,
        n_ff=max(meta.per_layer("feed_forward_length", n_block, [0] * n_block)),
        n_vocab=embedding.ne[1] if embedding is not None else meta.number("vocab_size", 0),
        n_swa=n_swa,
        weights_bytes=sum(tensor.n_bytes for tensor in tensors),
        layers=tuple(layers),
        refused=_refusal(meta, layers),
    )


class _Metadata:
    """Typed look-ups under the prefix of the architecture: a value of another kind is a damaged file."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path = path
        self.values = values
        arch = values.get("general.architecture")
        if not isinstance(arch, str):
            raise ModelFileError(
                f"expected the metadata general.architecture in {path}, got {'none' if arch is None else repr(arch)}; "
                "convert the model again"
            )
        self.arch = arch

    def _refuse(self, key: str, expected: str, value: Any) -> ModelFileError:
        return ModelFileError(
            f"{self.path}: expected {expected} in the metadata {self.arch}.{key}, got {value!r}; download the file or "
            "convert the model again"
        )

    def get(self, key: str) -> Any:
        """The value of any kind, or None."""
        return self.values.get(f"{self.arch}.{key}")

    def number(self, key: str, default: int) -> int:
        """A whole number of at least 0."""
        value = self.get(key)
        if value is None:
            return default
        if not _is_count(value):
            raise self._refuse(key, "a whole number", value)
        return int(value)

    def need(self, key: str, most: int) -> int:
        """A whole number from 1 to `most`, without which a file is no language model."""
        if self.get(key) is None:
            raise ModelFileError(
                f"expected the metadata {self.arch}.{key} of a language model in {self.path}, got none; "
                "give the file of the model itself, not of an adapter, projector or vocabulary"
            )
        value = self.number(key, 0)
        if not 0 < value <= most:
            raise self._refuse(key, f"1 to {most}", value)
        return value

    def per_layer(self, key: str, n_layer: int, default: Sequence[int]) -> list[int]:
        """A whole number that may be one for all layers or one for each."""
        value = self.get(key)
        if value is None:
            return list(default)
        if not isinstance(value, list):
            return [self.number(key, 0)] * n_layer
        if len(value) < n_layer or not all(map(_is_count, value)):
            raise self._refuse(key, f"a whole number for each of {n_layer} layers", value)
        return value[:n_layer]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _sliding_window(meta: _Metadata, n_layer: int) -> tuple[int, list[bool]]:
    """Window in tokens and, per layer, whether it has one, as llama.cpp decides it."""
    arch = meta.arch
    n_swa = meta.number("attention.sliding_window", _SWA_DEFAULT.get(arch, 0))
    key = "attention.sliding_window_pattern"
    pattern = meta.per_layer(key, n_layer, ()) if isinstance(meta.get(key), list) else None
    if arch == "llama4":  # attends in chunks, kept like a window
        n_swa, period = 0 if meta.get("attention.sliding_window") == 0 else 8192, 4
    elif arch in _SWA_PERIOD:
        period = _SWA_PERIOD[arch] if pattern else meta.number(key, _SWA_PERIOD[arch])
    elif pattern:
        period = 1
    else:
        return 0, [False] * n_layer  # llama.cpp ignores the window of other architectures
    if n_swa == 0:
        return 0, [False] * n_layer
    if period == 0:
        return n_swa, [True] * n_layer
    if pattern:
        return n_swa, [bool(value) for value in pattern]
    full = 0 if period < 0 else period - 1
    return n_swa, [il % abs(period) != full for il in range(n_layer)]


def _n_own(meta: _Metadata, n_layer: int) -> int:
    """The first layers, which have K and V of their own; Gemma 3n's number stands in llama.cpp itself."""
    return 20 if meta.arch == "gemma3n" else n_layer - meta.number("attention.shared_kv_layers", 0)


def _readers(meta: _Metadata, il: int, n_layer: int, swa: list[bool]) -> int:
    """Layers that read layer il's K and V: the last two that have their own serve one kind each."""
    n_own = _n_own(meta, n_layer)
    return sum(il == n_own - (2 if swa[reader] else 1) for reader in range(n_own, n_layer))


def _cached_layers(meta: _Metadata, n_layer: int, n_head_kv: list[int]) -> list[bool]:
    """Per layer, whether it has a KV cache of its own."""
    if meta.arch in _RECURRENT:
        return [False] * n_layer
    n_own = _n_own(meta, n_layer)
    period = 1
    if meta.arch in _HYBRID_PERIOD:
        period = meta.number("full_attention_interval", _HYBRID_PERIOD[meta.arch]) or 1
    by_period = [int((il + 1) % period != 0) for il in range(n_layer)]
    recurrent = meta.per_layer("attention.recurrent_layers", n_layer, by_period)
    return [il < n_own and n_head_kv[il] > 0 and not recurrent[il] for il in range(n_layer)]


def _refusal(meta: _Metadata, layers: list[LayerShape]) -> str | None:
    if has := _native.arch_obstacle(meta.arch):
        return f"{meta.arch} has {has}"
    if not any(layer.kind == "full" for layer in layers):
        return f"{meta.arch} has no layer with full attention"
    if meta.get("attention.kv_lora_rank"):
        return f"{meta.arch} has multi-head latent attention (MLA)"
    if meta.get("attention.max_alibi_bias"):
        return f"{meta.arch} has ALiBi positions"
    if meta.get("attention.causal") in (False, 0):
        return f"{meta.arch} has non-causal attention"
    if meta.get("attention.indexer.top_k") or meta.get("attention.indexer.key_length"):
        return f"{meta.arch} has an indexer that chooses the tokens that it attends to"
    return None
