"""Tiny random GGUF models, one per architecture, written with the gguf package.

The weights are random but not careless: attention logits have a standard deviation of about 2, output logits of
1 to 2, so that wrong positions, masks or biases show in the logits. Files are below 2 MB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

# Architectures whose cache can be compressed. "llama3" is llama with RoPE frequency factors, "mistral" is llama with a
# head size that is not n_embd / n_head, "phi3-longrope" has long and short factors and rotates 3/4 of a head, every
# fourth layer of "smollm3" is without RoPE, every second layer of "lfm2" is a short convolution, whose state cannot be
# cut. "qwen2vl" has M-RoPE, "hunyuan-dense" weighs queries after RoPE, and of "gemma3n" and "gemma4" later layers read
# the rows of earlier ones.
SUPPORTED = (
    "llama",
    "llama3",
    "mistral",
    "mistral3",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "phi3-longrope",
    "smollm3",
    "lfm2",
    "qwen2vl",
    "hunyuan-dense",
    "gemma3n",
    "gemma4",
)

# Architectures that must be refused with kv_compress, and why.
REFUSED = {
    "mamba": "recurrent",
    "bloom": "ALiBi",
    "deepseek2": "MLA",
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_GGUF_ARCH = {"llama3": "llama", "mistral": "llama", "phi3-longrope": "phi3"}
_ATTN_GAIN = math.sqrt(2.0)  # of q and of k: attention logits then have a standard deviation of 2
# Of gemma3 five sliding-window layers, one full, one sliding-window; of gemma3n every fifth is full, and those from 20
# on read others' rows; gemma4 has full layers 1 and 3, which 5 and 6 read, and sliding windows 0, 2 and 4.
_N_LAYER = {"gemma3": 7, "smollm3": 4, "lfm2": 4, "gemma3n": 25, "gemma4": 7}
_EPS = 1e-5


def write_tiny(
    path: str | Path,
    arch: str,
    *,
    n_layer: int | None = None,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_embd_head: int | None = None,
    n_ctx_train: int = 4096,
    n_swa: int = 64,
    dtype: str = "f32",
    seed: int = 0,
    k_bias: float = 0.0,
    has_vocabulary: bool = True,
    n_split_tensors: int = 0,
    metadata: Mapping[str, str | int | float | bool] | None = None,
) -> Path:
    """Write a tiny random model.

    Parameters
    ----------
    path : path
        File to write; replaced if it exists.
    arch : str
        One of `SUPPORTED` or a key of `REFUSED`.
    n_layer : int, optional
        Default 2, or as many as an architecture needs.
    n_embd, n_head, n_head_kv : int
        Width, query heads, kv heads. bloom has as many kv heads as query heads, deepseek2 (MLA) one.
    n_embd_head : int, optional
        Head size of K and V. Default n_embd // n_head, twice that for mistral, qwen3 and gemma, which allow it.
        qwen2, qwen2vl, phi3 and bloom need the default.
    n_ctx_train : int
        Context length in the metadata, tokens.
    n_swa : int
        Sliding window of gemma models, tokens.
    dtype : {"f32", "f16"}
        Type of the matrices; vectors are always f32.
    seed : int
        Of the weights.
    k_bias : float
        What all keys of qwen2 share in the quarter of the channels that RoPE turns most slowly.
    has_vocabulary : bool
        Without one a model only has token numbers.
    n_split_tensors : int
        If not 0: split over several files of this many tensors, the first of none.
    metadata : mapping, optional
        More metadata; "{arch}" in a key stands for the GGUF architecture, as in "{arch}.rope.scaling.type".

    Returns
    -------
    Path
        `path`, or the first file that begins with its stem.
    """
    if arch not in SUPPORTED and arch not in REFUSED:
        raise ValueError(f"expected an architecture of {', '.join((*SUPPORTED, *REFUSED))}, got {arch!r}")
    builder = _Builder(Path(path), arch, dtype, seed, n_split_tensors)
    builder.k_bias = k_bias
    builder.vocabulary(has_vocabulary)
    builder.model(n_layer or _N_LAYER.get(arch, 2), n_embd, n_head, n_head_kv, n_embd_head, n_ctx_train, n_swa)
    for key, value in (metadata or {}).items():
        builder.add_metadata(key, value)
    return builder.finish()


def vocabulary() -> list[tuple[str, gguf.TokenType]]:
    """Tokens of every tiny model in order: control tokens, the 256 bytes, then a few pieces; 300 tokens in all."""
    control = [("<unk>", gguf.TokenType.UNKNOWN)]
    control += [(text, gguf.TokenType.CONTROL) for text in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")]
    bytes_ = [(f"<0x{byte:02X}>", gguf.TokenType.BYTE) for byte in range(256)]
    pieces = ["\u2581", ".", ",", "\n", "!", "?", ":", ";", "{", "}", "\u3002", "'", "-"]
    pieces += [chr(code) for code in range(ord("a"), ord("z") + 1)]
    return control + bytes_ + [(piece, gguf.TokenType.NORMAL) for piece in pieces]


def is_printable(token: int) -> bool:
    """Whether a token is ASCII text. All others are unlikely, so that answers can be read and run to max_tokens."""
    text, kind = vocabulary()[token]
    if kind == gguf.TokenType.BYTE:
        return 0x20 <= int(text[3:5], 16) < 0x7F
    return kind == gguf.TokenType.NORMAL and text.isascii()


class _Builder:
    def __init__(self, path: Path, arch: str, dtype: str, seed: int, n_split_tensors: int):
        self.path = path
        self.arch = arch
        self.n_split_tensors = n_split_tensors
        self.gguf_arch = _GGUF_ARCH.get(arch, arch)
        self.dtype = {"f32": np.float32, "f16": np.float16}[dtype]
        self.rng = np.random.default_rng(seed)
        self.k_bias = 0.0
        self.writer = gguf.GGUFWriter(
            path, self.gguf_arch, split_max_tensors=n_split_tensors, small_first_shard=n_split_tensors > 0
        )
        self.writer.add_name("tiny")  # not the architecture: llama.cpp expects certain tokens of a model named phi3
        self.writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "f32" else gguf.LlamaFileType.MOSTLY_F16)

    def finish(self) -> Path:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return min(self.path.parent.glob(f"{self.path.stem}-00001-of-*")) if self.n_split_tensors else self.path

    def add_metadata(self, key: str, value: str | int | float | bool) -> None:
        add = {str: self.writer.add_string, bool: self.writer.add_bool, int: self.writer.add_uint32}
        add.get(type(value), self.writer.add_float32)(key.format(arch=self.gguf_arch), value)

    # tensors; shapes in numpy order, the reverse of ggml's

    def tensor(self, name: str, values: np.ndarray, dtype: type = np.float32) -> None:
        self.writer.add_tensor(name, np.ascontiguousarray(values, dtype=dtype))

    def matrix(self, name: str, *shape: int, gain: float = 1.0) -> None:
        """Random matrix [..., n_out, n_in] that keeps the variance of its input, times gain squared."""
        self.tensor(name, self.rng.normal(0.0, gain / math.sqrt(shape[-1]), shape), self.dtype)

    def norm(self, name: str, n: int, gain: float = 1.0) -> None:
        self.tensor(name, gain * (1.0 + 0.1 * self.rng.normal(size=n)))

    def bias(self, name: str, n: int, scale: float = 0.1, shared: npt.ArrayLike = 0.0) -> None:
        self.tensor(name, scale * self.rng.normal(size=n) + shared)

    # parts

    def vocabulary(self, is_there: bool) -> None:
        w = self.writer
        tokens = vocabulary()
        self.n_vocab = len(tokens)
        if not is_there:
            w.add_tokenizer_model("none")
            return
        w.add_tokenizer_model("llama")
        w.add_tokenizer_pre("default")
        w.add_token_list([text for text, _ in tokens])
        w.add_token_scores([-float(i) for i in range(len(tokens))])
        w.add_token_types([kind for _, kind in tokens])
        w.add_unk_token_id(0)
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        w.add_eot_token_id(4)
        w.add_add_bos_token(True)
        w.add_add_eos_token(False)
        w.add_add_space_prefix(False)
        w.add_chat_template(CHAT_TEMPLATE)

    def model(
        self,
        n_layer: int,
        n_embd: int,
        n_head: int,
        n_head_kv: int,
        n_embd_head: int | None,
        n_ctx_train: int,
        n_swa: int,
    ) -> None:
        w = self.writer
        self.n_embd, self.n_head, self.n_head_kv, self.n_ff = n_embd, n_head, n_head_kv, 2 * n_embd
        wide = 2 if self.arch in ("mistral", "qwen3", "gemma2", "gemma3", "gemma3n", "gemma4") else 1
        self.d = n_embd_head or wide * n_embd // n_head
        self.n_ctx_train, self.n_swa = n_ctx_train, n_swa
        w.add_context_length(n_ctx_train)
        w.add_embedding_length(n_embd)
        w.add_block_count(n_layer)
        w.add_vocab_size(self.n_vocab)

        # gemma multiplies the embedding by sqrt(n_embd)
        gemma = self.arch.startswith("gemma")
        embd_std = 1.6 / math.sqrt(n_embd) if gemma else 1.0
        self.tensor("token_embd.weight", self.rng.normal(0.0, embd_std, (self.n_vocab, n_embd)), self.dtype)
        if self.arch != "gemma2":  # gemma2's output matrix is its embedding
            output = self.rng.normal(0.0, 2.0 / math.sqrt(n_embd), (self.n_vocab, n_embd))
            output[[not is_printable(i) for i in range(self.n_vocab)]] *= 0.05
            self.tensor("output.weight", output, self.dtype)
        self.norm("token_embd_norm.weight" if self.arch == "lfm2" else "output_norm.weight", n_embd)

        others = {
            "mamba": self.mamba,
            "bloom": self.bloom,
            "deepseek2": self.deepseek2,
            "gemma3n": self.gemma3n,
            "gemma4": self.gemma4,
        }
        others.get(self.arch, self.transformer)(n_layer)

    def attention_metadata(self, n_head_kv: int | list[int]) -> None:
        w = self.writer
        w.add_feed_forward_length(self.n_ff)
        w.add_head_count(self.n_head)
        w.add_head_count_kv(n_head_kv)

    def transformer(self, n_layer: int) -> None:
        w, arch, d = self.writer, self.arch, self.d
        gemma = arch.startswith("gemma")
        is_conv = [arch == "lfm2" and il % 2 == 0 for il in range(n_layer)]
        self.attention_metadata([0 if conv else self.n_head_kv for conv in is_conv] if any(is_conv) else self.n_head_kv)
        w.add_layer_norm_rms_eps(_EPS)
        if any(is_conv):
            w.add_shortconv_l_cache(3)
        if d != self.n_embd // self.n_head:
            w.add_key_length(d)
            w.add_value_length(d)
        n_rot = d
        if arch == "phi3-longrope":
            n_rot = d * 3 // 4
            n_ctx_orig = self.n_ctx_train // 4
            w.add_rope_scaling_orig_ctx_len(n_ctx_orig)
            w.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(4) / math.log(n_ctx_orig)))
            self.tensor("rope_factors_long.weight", np.linspace(1.0, 8.0, n_rot // 2))
            self.tensor("rope_factors_short.weight", np.linspace(1.0, 1.5, n_rot // 2))
        elif arch == "llama3":
            self.tensor("rope_freqs.weight", np.linspace(1.0, 8.0, n_rot // 2))
        elif arch == "qwen2vl":
            quarter = n_rot // 8
            w.add_rope_dimension_sections([n_rot // 2 - 2 * quarter, quarter, quarter, 0])
        w.add_rope_dimension_count(n_rot)
        w.add_rope_freq_base(1e6 if arch in ("mistral", "mistral3", "qwen3", "gemma3") else 1e4)
        if gemma:
            w.add_sliding_window(self.n_swa)
        if arch == "gemma2":
            w.add_attn_logit_softcapping(5.0)  # 50 in the real model; here low enough to bend the logits
            w.add_final_logit_softcapping(30.0)
        elif arch == "gemma3":
            w.add_rope_freq_base_swa(1e4)

        n_q, n_kv = self.n_head * d, self.n_head_kv * d
        for il in range(n_layer):
            blk = f"blk.{il}"
            self.norm(f"{blk}.attn_norm.weight", self.n_embd)
            if is_conv[il]:
                self.tensor(f"{blk}.shortconv.conv.weight", self.rng.normal(0.0, 1.0, (self.n_embd, 3)))
                self.matrix(f"{blk}.shortconv.in_proj.weight", 3 * self.n_embd, self.n_embd)
                self.matrix(f"{blk}.shortconv.out_proj.weight", self.n_embd, self.n_embd)
            elif arch.startswith("phi3"):
                q, k, v = (
                    self.rng.normal(0.0, gain / math.sqrt(self.n_embd), (n, self.n_embd))
                    for n, gain in ((n_q, _ATTN_GAIN), (n_kv, _ATTN_GAIN), (n_kv, 1.0))
                )
                self.tensor(f"{blk}.attn_qkv.weight", np.concatenate([q, k, v]), self.dtype)
            else:
                qk_norm = arch in ("qwen3", "gemma3", "hunyuan-dense", "lfm2")
                self.matrix(f"{blk}.attn_q.weight", n_q, self.n_embd, gain=1.0 if qk_norm else _ATTN_GAIN)
                self.matrix(f"{blk}.attn_k.weight", n_kv, self.n_embd, gain=1.0 if qk_norm else _ATTN_GAIN)
                self.matrix(f"{blk}.attn_v.weight", n_kv, self.n_embd)
                if arch in ("qwen2", "qwen2vl"):
                    is_slow = np.arange(n_kv) % (d // 2) >= d // 2 - d // 8
                    for part, n in (("q", n_q), ("k", n_kv), ("v", n_kv)):
                        self.bias(f"{blk}.attn_{part}.bias", n, 0.3, self.k_bias * is_slow if part == "k" else 0.0)
                if qk_norm:
                    self.norm(f"{blk}.attn_q_norm.weight", d, _ATTN_GAIN)
                    self.norm(f"{blk}.attn_k_norm.weight", d, _ATTN_GAIN)
            if not is_conv[il]:
                self.matrix(f"{blk}.attn_output.weight", self.n_embd, n_q, gain=3.0)
            if gemma:
                self.norm(f"{blk}.post_attention_norm.weight", self.n_embd, 2.0)
                self.norm(f"{blk}.post_ffw_norm.weight", self.n_embd, 2.0)
            self.norm(f"{blk}.ffn_norm.weight", self.n_embd)
            self.feed_forward(blk, fused=arch.startswith("phi3"))

    def feed_forward(self, blk: str, fused: bool = False) -> None:
        if fused:
            self.matrix(f"{blk}.ffn_up.weight", 2 * self.n_ff, self.n_embd)
        else:
            self.matrix(f"{blk}.ffn_gate.weight", self.n_ff, self.n_embd)
            self.matrix(f"{blk}.ffn_up.weight", self.n_ff, self.n_embd)
        self.matrix(f"{blk}.ffn_down.weight", self.n_embd, self.n_ff, gain=2.0)

    def bloom(self, n_layer: int) -> None:
        self.attention_metadata(self.n_head)
        self.writer.add_layer_norm_eps(_EPS)
        n_embd = self.n_embd
        for name in ("token_embd_norm", "output_norm"):
            if name != "output_norm":
                self.norm(f"{name}.weight", n_embd)
            self.bias(f"{name}.bias", n_embd)
        for il in range(n_layer):
            blk = f"blk.{il}"
            for name in ("attn_norm", "ffn_norm"):
                self.norm(f"{blk}.{name}.weight", n_embd)
                self.bias(f"{blk}.{name}.bias", n_embd)
            shapes = {
                "attn_qkv": (3 * n_embd, n_embd),
                "attn_output": (n_embd, n_embd),
                "ffn_up": (self.n_ff, n_embd),
                "ffn_down": (n_embd, self.n_ff),
            }
            for name, (n_out, n_in) in shapes.items():
                self.matrix(f"{blk}.{name}.weight", n_out, n_in, gain=_ATTN_GAIN)
                self.bias(f"{blk}.{name}.bias", n_out)

    def deepseek2(self, n_layer: int) -> None:
        w, n_embd, n_head = self.writer, self.n_embd, self.n_head
        d_nope, d_rope, d_v, rank_q, rank_kv = 16, 8, 16, 24, 32
        self.attention_metadata(1)
        w.add_layer_norm_rms_eps(_EPS)
        w.add_leading_dense_block_count(n_layer)  # no experts
        w.add_expert_feed_forward_length(self.n_ff)
        w.add_expert_shared_count(1)
        w.add_q_lora_rank(rank_q)
        w.add_kv_lora_rank(rank_kv)
        w.add_key_length(rank_kv + d_rope)
        w.add_value_length(rank_kv)
        w.add_key_length_mla(d_nope + d_rope)
        w.add_value_length_mla(d_v)
        w.add_rope_dimension_count(d_rope)
        for il in range(n_layer):
            blk = f"blk.{il}"
            self.norm(f"{blk}.attn_norm.weight", n_embd)
            self.norm(f"{blk}.attn_q_a_norm.weight", rank_q)
            self.norm(f"{blk}.attn_kv_a_norm.weight", rank_kv)
            self.matrix(f"{blk}.attn_q_a.weight", rank_q, n_embd)
            self.matrix(f"{blk}.attn_q_b.weight", n_head * (d_nope + d_rope), rank_q, gain=_ATTN_GAIN)
            self.matrix(f"{blk}.attn_kv_a_mqa.weight", rank_kv + d_rope, n_embd)
            self.matrix(f"{blk}.attn_k_b.weight", n_head, rank_kv, d_nope, gain=_ATTN_GAIN)
            self.matrix(f"{blk}.attn_v_b.weight", n_head, d_v, rank_kv)
            self.matrix(f"{blk}.attn_output.weight", n_embd, n_head * d_v)
            self.norm(f"{blk}.ffn_norm.weight", n_embd)
            self.feed_forward(blk)

    def gemma_layer(self, il: int, d: int, has_kv: bool, has_v: bool = True, post_gain: float = 2.0) -> None:
        """What the layers of Gemma 3n and 4 share. Queries and keys are normalized, their product is not scaled."""
        blk, gain = f"blk.{il}", math.sqrt(2.0 / math.sqrt(d))
        for name in ("attn_norm", "ffn_norm"):
            self.norm(f"{blk}.{name}.weight", self.n_embd)
        for name in ("post_attention_norm", "post_ffw_norm"):
            self.norm(f"{blk}.{name}.weight", self.n_embd, post_gain)
        self.matrix(f"{blk}.attn_q.weight", self.n_head * d, self.n_embd)
        self.norm(f"{blk}.attn_q_norm.weight", d, gain)
        if has_kv:
            self.matrix(f"{blk}.attn_k.weight", self.n_head_kv * d, self.n_embd)
            self.norm(f"{blk}.attn_k_norm.weight", d, gain)
        if has_kv and has_v:
            self.matrix(f"{blk}.attn_v.weight", self.n_head_kv * d, self.n_embd)
        self.matrix(f"{blk}.attn_output.weight", self.n_embd, self.n_head * d, gain=3.0)
        self.feed_forward(blk)

    def gemma4(self, n_layer: int) -> None:
        w, d, d_swa = self.writer, self.d, self.d // 2
        is_swa = [il < 5 and il % 2 == 0 for il in range(n_layer)]
        n_shared = 3
        self.attention_metadata(self.n_head_kv)
        w.add_layer_norm_rms_eps(_EPS)
        w.add_key_length(d)
        w.add_value_length(d)
        w.add_key_length_swa(d_swa)
        w.add_value_length_swa(d_swa)
        w.add_rope_dimension_count(d)
        w.add_rope_dimension_count_swa(d_swa)
        w.add_rope_freq_base(1e6)
        w.add_rope_freq_base_swa(1e4)
        w.add_sliding_window(self.n_swa)
        w.add_sliding_window_pattern(is_swa)
        w.add_shared_kv_layers(n_shared)
        w.add_embedding_length_per_layer_input(0)
        w.add_final_logit_softcapping(30.0)
        turned = np.where(np.arange(d // 2) < d // 8, 1.0, 1e30)  # a quarter of the pairs is turned
        self.tensor("rope_freqs.weight", turned)
        for il in range(n_layer):  # full layers have no V: it is K without RoPE
            has_kv = il < n_layer - n_shared
            self.gemma_layer(il, d_swa if is_swa[il] else d, has_kv, has_v=is_swa[il], post_gain=0.7)

    def gemma3n(self, n_layer: int) -> None:
        w, d, n_embd, n_altup, n_embd_altup, rank = self.writer, self.d, self.n_embd, 4, 256, 64  # as in llama.cpp
        n_own = 20  # likewise
        self.attention_metadata(self.n_head_kv)
        w.add_layer_norm_rms_eps(_EPS)
        w.add_key_length(d)
        w.add_value_length(d)
        w.add_rope_dimension_count(d)
        w.add_rope_freq_base(1e6)
        w.add_rope_freq_base_swa(1e4)
        w.add_sliding_window(self.n_swa)
        w.add_shared_kv_layers(n_layer - n_own)
        w.add_final_logit_softcapping(30.0)
        self.matrix("altup_proj.weight", n_altup - 1, n_embd, n_embd)
        self.matrix("altup_unembd_proj.weight", n_altup - 1, n_embd, n_embd)
        self.matrix("per_layer_token_embd.weight", self.n_vocab, n_embd_altup * n_layer)
        self.matrix("per_layer_model_proj.weight", n_embd_altup * n_layer, n_embd)
        self.norm("per_layer_proj_norm.weight", n_embd_altup)
        for il in range(n_layer):
            blk = f"blk.{il}"
            # all have K and V in the file; 25 layers in a row must not amplify the noise of a sum
            self.gemma_layer(il, d, has_kv=True, post_gain=0.3)
            self.matrix(f"{blk}.inp_gate.weight", n_embd_altup, n_embd)
            self.matrix(f"{blk}.proj.weight", n_embd, n_embd_altup)
            self.norm(f"{blk}.post_norm.weight", n_embd, 0.1)
            self.matrix(f"{blk}.altup_correct_coef.weight", n_altup, n_altup, gain=0.1)
            self.norm(f"{blk}.altup_correct_scale.weight", n_embd)
            self.matrix(f"{blk}.altup_predict_coef.weight", n_altup * n_altup, n_altup, gain=0.05)
            self.matrix(f"{blk}.altup_router.weight", n_altup, n_embd)
            self.norm(f"{blk}.altup_router_norm.weight", n_embd)
            self.matrix(f"{blk}.laurel_l.weight", rank, n_embd)
            self.matrix(f"{blk}.laurel_r.weight", n_embd, rank)
            self.norm(f"{blk}.laurel_post_norm.weight", n_embd)

    def mamba(self, n_layer: int) -> None:
        w, n_embd = self.writer, self.n_embd
        d_inner, d_conv, d_state, dt_rank = 2 * n_embd, 4, 16, max(1, n_embd // 16)
        w.add_feed_forward_length(0)
        w.add_head_count(0)
        w.add_layer_norm_rms_eps(_EPS)
        w.add_ssm_conv_kernel(d_conv)
        w.add_ssm_inner_size(d_inner)
        w.add_ssm_state_size(d_state)
        w.add_ssm_time_step_rank(dt_rank)
        for il in range(n_layer):
            blk = f"blk.{il}"
            self.norm(f"{blk}.attn_norm.weight", n_embd)
            self.matrix(f"{blk}.ssm_in.weight", 2 * d_inner, n_embd)
            # llama.cpp's convolution and scan take these three in f32 only
            self.tensor(f"{blk}.ssm_conv1d.weight", self.rng.normal(0.0, 0.5, (d_inner, d_conv)))
            self.tensor(f"{blk}.ssm_a", -np.tile(np.arange(1.0, d_state + 1), (d_inner, 1)))
            self.tensor(f"{blk}.ssm_d", np.ones(d_inner))
            self.bias(f"{blk}.ssm_conv1d.bias", d_inner)
            self.matrix(f"{blk}.ssm_x.weight", dt_rank + 2 * d_state, d_inner)
            self.matrix(f"{blk}.ssm_dt.weight", d_inner, dt_rank)
            self.tensor(f"{blk}.ssm_dt.bias", np.log(np.expm1(np.geomspace(0.01, 0.1, d_inner))))
            self.matrix(f"{blk}.ssm_out.weight", n_embd, d_inner)
