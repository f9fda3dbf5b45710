"""What the metadata of a GGUF file says about the attention of a model, as llama.cpp reads it; the model is not
loaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ModelFileError
from .gguf_file import read_gguf, split_files

if TYPE_CHECKING:
    from gguf import GGUFReader

_RECURRENT = ("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7")
_ALIBI = ("bloom", "refact", "jais")
_ENCODERS = ("t5", "t5encoder", "eagle3", "dflash")
_SHARED_KV = ("gemma3n", "gemma4")
_NOT_CAUSAL = ("dream", "gemma-embedding", "llada", "llada-moe", "rnd1")
# A cache, a softcap or a place of RoPE in the head of their own.
_UNUSUAL = (
    "grok",
    "minimax-m3",
    "glm-dsa",
    "deepseek32",
    "deepseek4",
    "glm5-next",
    "hy_v4",
    "dots3note",
    "minicpm3",
    "plm",
    "deepseek2",
)
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
    """

    il: int
    kind: str
    n_head: int
    n_head_kv: int
    n_embd_head_k: int
    n_embd_head_v: int


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


def read_shape(path: str | os.PathLike[str]) -> ModelShape:
    """Read the metadata of a GGUF file, of a model that is split over several the first; the model is not loaded.

    Raises
    ------
    ModelFileError
        Not a readable, complete GGUF file, or one without the metadata of a language model.
    """
    reader = read_gguf(path)
    readers = [reader, *(read_gguf(file) for file in split_files(path, reader)[1:])]
    meta = _Metadata(reader, path)
    arch = meta.arch
    n_block = meta.need("block_count")
    n_layer = n_block - meta.get("nextn_predict_layers", 0)
    n_embd = meta.need("embedding_length")
    n_head = meta.per_layer("attention.head_count", n_block, 0)
    n_head_kv = meta.per_layer("attention.head_count_kv", n_block, n_head)
    head = n_embd // n_head[0] if n_head[0] else 0
    d_k, d_v = meta.get("attention.key_length", head), meta.get("attention.value_length", head)
    d_k_swa, d_v_swa = meta.get("attention.key_length_swa", d_k), meta.get("attention.value_length_swa", d_v)
    mla = bool(meta.get("attention.key_length_mla", 0))
    n_swa, swa = _sliding_window(meta, n_layer)
    cached = _cached_layers(meta, n_layer, n_head_kv)

    layers = []
    for il in range(n_layer):
        kind = "none" if not cached[il] else "swa" if swa[il] else "full"
        k, v = (d_k_swa, d_v_swa) if swa[il] else (d_k, d_v)
        layers.append(LayerShape(il, kind, n_head[il], n_head_kv[il] if cached[il] else 0, k, 0 if mla else v))

    tensors = [tensor for reader in readers for tensor in reader.tensors]
    embedding = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    return ModelShape(
        path=str(path),
        name=meta.general("name", ""),
        arch=arch,
        n_ctx_train=meta.get("context_length", 0),
        n_embd=n_embd,
        n_ff=max(meta.per_layer("feed_forward_length", n_block, 0)),
        n_vocab=int(embedding.shape[-1]) if embedding is not None else meta.get("vocab_size", 0),
        n_swa=n_swa,
        weights_bytes=sum(int(tensor.n_bytes) for tensor in tensors),
        layers=tuple(layers),
        refused=_refusal(meta, layers),
    )


class _Metadata:
    """Typed look-ups under the prefix of the architecture."""

    def __init__(self, reader: GGUFReader, path: str | os.PathLike[str]):
        self.reader = reader
        self.path = path
        self.arch = self.general("architecture", None)
        if self.arch is None:
            raise ModelFileError(
                f"expected the metadata general.architecture in {path}, got none; convert the model again"
            )

    def general(self, key: str, default: Any) -> Any:
        field = self.reader.get_field(f"general.{key}")
        return default if field is None else field.contents()

    def get(self, key: str, default: Any) -> Any:
        field = self.reader.get_field(f"{self.arch}.{key}")
        return default if field is None else field.contents()

    def need(self, key: str) -> int:
        value = self.get(key, None)
        if value is None:
            raise ModelFileError(
                f"expected the metadata {self.arch}.{key} of a language model in {self.path}, got none; "
                "give the file of the model itself, not of an adapter, projector or vocabulary"
            )
        return value

    def per_layer(self, key: str, n_layer: int, default: int | list[int]) -> list[int]:
        """A value that may be one for all layers or one for each."""
        value = self.get(key, default)
        return [value] * n_layer if not isinstance(value, list) else value


def _sliding_window(meta: _Metadata, n_layer: int) -> tuple[int, list[bool]]:
    """Window in tokens and, per layer, whether it has one, as llama.cpp decides it."""
    arch = meta.arch
    n_swa = meta.get("attention.sliding_window", _SWA_DEFAULT.get(arch, 0))
    pattern = meta.get("attention.sliding_window_pattern", None)
    if arch == "llama4":  # attends in chunks, kept like a window
        n_swa, period = 0 if meta.get("attention.sliding_window", None) == 0 else 8192, 4
    elif arch in _SWA_PERIOD:
        period = pattern if isinstance(pattern, int) else _SWA_PERIOD[arch]
    elif isinstance(pattern, list):
        period = 1
    else:
        return 0, [False] * n_layer  # llama.cpp ignores the window of other architectures
    if n_swa == 0:
        return 0, [False] * n_layer
    if isinstance(pattern, list):
        return n_swa, [bool(value) for value in pattern[:n_layer]]
    full = 0 if period < 0 else period - 1
    return n_swa, [il % abs(period) != full for il in range(n_layer)]


def _cached_layers(meta: _Metadata, n_layer: int, n_head_kv: list[int]) -> list[bool]:
    """Per layer, whether it has a KV cache of its own."""
    if meta.arch in _RECURRENT:
        return [False] * n_layer
    n_own = n_layer - meta.get("attention.shared_kv_layers", 0)
    recurrent = meta.get("attention.recurrent_layers", None)
    if recurrent is None and meta.arch in _HYBRID_PERIOD:
        period = meta.get("full_attention_interval", _HYBRID_PERIOD[meta.arch])
        recurrent = [(il + 1) % period != 0 for il in range(n_layer)]
    return [il < n_own and n_head_kv[il] > 0 and not (recurrent and recurrent[il]) for il in range(n_layer)]


def _refusal(meta: _Metadata, layers: list[LayerShape]) -> str | None:
    if not any(layer.kind == "full" for layer in layers):
        return f"{meta.arch} has no layer with full attention"
    if meta.get("attention.kv_lora_rank", 0):
        return f"{meta.arch} uses multi-head latent attention (MLA)"
    if meta.arch in _ALIBI or meta.get("attention.max_alibi_bias", 0):
        return f"{meta.arch} uses ALiBi positions"
    if meta.get("rope.dimension_sections", None):
        return f"{meta.arch} uses M-RoPE positions"
    if meta.arch in _ENCODERS or meta.arch in _NOT_CAUSAL or not meta.get("attention.causal", True):
        return f"{meta.arch} is an encoder or has non-causal attention"
    if meta.arch in _SHARED_KV:
        return f"{meta.arch} may share K and V between layers"
    if meta.get("attention.indexer.top_k", 0) or meta.get("attention.indexer.key_length", 0):
        return f"{meta.arch} chooses the tokens that it attends to by an indexer"
    if meta.arch in _UNUSUAL:
        return f"{meta.arch} has attention or a cache of its own kind"
    return None
