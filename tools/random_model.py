"""Models of well-known shapes with random weights: speed and memory do not ask what the weights say.

    python tools/random_model.py llama-3-8b FILE

Matrices are Q4_K as llama.cpp's quantizer lays them out, norms are 1, tokens are bytes and placeholders.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np


@dataclass(frozen=True)
class Shape:
    arch: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    freq_base: float
    tied: bool  # the embedding is the output matrix


SHAPES = {
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 4864, 14, 2, 151936, 1e6, True),
    "llama-3-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128256, 5e5, False),
    "tiny": Shape("llama", 2, 512, 1024, 8, 2, 512, 1e4, False),
}

_BLOCK = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])  # of 256 weights in Q4_K


class _Writer:
    def __init__(self, path: Path, shape: Shape) -> None:
        self.gguf = gguf.GGUFWriter(path, shape.arch)
        rng = np.random.default_rng(0)
        self.blocks = np.frombuffer(rng.bytes(_BLOCK.itemsize << 14), _BLOCK).copy()
        self.blocks["d"] = 1e-4  # weights of about 0.02, with a mean of about 0
        self.blocks["dmin"] = 7.5e-4

    def matrix(self, name: str, n_out: int, n_in: int) -> None:
        if n_in % 256:  # as llama.cpp's quantizer falls back
            data = gguf.quants.quantize(np.resize(_normal(64, n_in), (n_out, n_in)), gguf.GGMLQuantizationType.Q5_0)
            self.gguf.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q5_0)
            return
        data = np.resize(self.blocks, (n_out, n_in // 256)).view(np.uint8)
        self.gguf.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q4_K)

    def vector(self, name: str, n: int, value: float) -> None:
        self.gguf.add_tensor(name, np.full(n, value, np.float32))


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)


def write(path: Path, name: str) -> None:
    """Write the model of this name in `SHAPES`."""
    s = SHAPES[name]
    w = _Writer(path, s)
    g, d = w.gguf, s.n_embd // s.n_head
    g.add_name(f"random-{name}")
    g.add_context_length(131072)
    g.add_embedding_length(s.n_embd)
    g.add_block_count(s.n_layer)
    g.add_feed_forward_length(s.n_ff)
    g.add_head_count(s.n_head)
    g.add_head_count_kv(s.n_head_kv)
    g.add_rope_dimension_count(d)
    g.add_rope_freq_base(s.freq_base)
    g.add_layer_norm_rms_eps(1e-5)
    g.add_vocab_size(s.n_vocab)
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [gguf.TokenType.UNKNOWN] + 2 * [gguf.TokenType.CONTROL] + 256 * [gguf.TokenType.BYTE]
    tokens += [f"<{i}>" for i in range(len(tokens), s.n_vocab)]
    kinds += (s.n_vocab - len(kinds)) * [gguf.TokenType.USER_DEFINED]
    g.add_tokenizer_model("llama")
    g.add_tokenizer_pre("default")
    g.add_token_list(tokens)
    g.add_token_scores([-float(i) for i in range(s.n_vocab)])
    g.add_token_types(kinds)
    g.add_bos_token_id(1)
    g.add_eos_token_id(2)
    w.matrix("token_embd.weight", s.n_vocab, s.n_embd)
    if not s.tied:
        w.matrix("output.weight", s.n_vocab, s.n_embd)
    w.vector("output_norm.weight", s.n_embd, 1.0)
    for il in range(s.n_layer):
        blk = f"blk.{il}"
        w.vector(f"{blk}.attn_norm.weight", s.n_embd, 1.0)
        w.vector(f"{blk}.ffn_norm.weight", s.n_embd, 1.0)
        for part, n in (("q", s.n_head), ("k", s.n_head_kv), ("v", s.n_head_kv)):
            w.matrix(f"{blk}.attn_{part}.weight", n * d, s.n_embd)
            if s.arch == "qwen2":
                w.vector(f"{blk}.attn_{part}.bias", n * d, 0.0)
        w.matrix(f"{blk}.attn_output.weight", s.n_embd, s.n_head * d)
        w.matrix(f"{blk}.ffn_gate.weight", s.n_ff, s.n_embd)
        w.matrix(f"{blk}.ffn_up.weight", s.n_ff, s.n_embd)
        w.matrix(f"{blk}.ffn_down.weight", s.n_embd, s.n_ff)
    g.write_header_to_file()
    g.write_kv_data_to_file()
    g.write_tensors_to_file()
    g.close()


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(f"usage: random_model.py {'|'.join(SHAPES)} FILE")
    write(Path(sys.argv[2]), sys.argv[1])
