"""Attention Matching (Zweiger et al. 2026, arXiv 2602.16284), for `transformers_worker`: what it needs of torch and
transformers is there.

A cache is compacted once, after the whole text was read. Reference queries are those with which the model reads the
text a second time, having been told to repeat it. Of a head's keys those stay that get the highest root mean square of
attention from them; biases by non-negative least squares make up for the mass of the keys that went, values by least
squares for their outputs. Constants are those of the authors' configuration that selects by highest attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

NAME = "attention-matching"
REPEAT = "\n\nRepeat the previous context verbatim.\n\n"
N_BLOCK = 512  # tokens that are read, and queries that are looked at, together
N_QUERY = 50_000  # of a kv head at the most
LOG_WEIGHT = 3.0  # biases lie within +- this
N_STEP = 2  # of projected gradients, behind clamped least squares
EMPTY = -1e30  # bias of a place that holds no row


@dataclass
class Watch:
    """What the attention of all layers knows beside its arguments."""

    bias: dict[int, torch.Tensor]  # by layer [n_head_kv, n_row] of the cache's first rows
    queries: dict[int, list[torch.Tensor]] | None = None  # by layer, blocks [n_head_kv, n_gqa, n_token, head_dim]


_watch = Watch({})


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,  # kvpress passes it by place
    scaling: float = 1.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with a bias per row: query [1, n_head, n_token, head_dim], key and value [1, n_head_kv, n_row, ...].
    Causal by itself: the mask that transformers makes is as long as the first layer's rows."""
    n_token = query.shape[2]
    n_head_kv, n_row = key.shape[1:3]
    q = query[0].unflatten(0, (n_head_kv, -1))
    if _watch.queries is not None:
        _watch.queries.setdefault(module.layer_idx, []).append(q * scaling)
    scores = torch.einsum("hgqd,hkd->hgqk", q, key[0]) * scaling
    scores.masked_fill_(torch.ones(n_token, n_row, dtype=torch.bool).triu(n_row - n_token + 1), -math.inf)
    if (bias := _watch.bias.get(module.layer_idx)) is not None:
        scores[..., : bias.shape[1]] += bias[:, None, None]
    out = torch.einsum("hgqk,hkd->hgqd", scores.softmax(-1), value[0])
    return out.flatten(0, 1).transpose(0, 1)[None], None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def read(model: Any, tokens: Sequence[int], cache: DynamicCache) -> None:
    """Reads tokens behind those of the cache."""
    for i in range(0, len(tokens), N_BLOCK):
        model.model(input_ids=torch.tensor([tokens[i : i + N_BLOCK]]), past_key_values=cache)


def non_negative(m: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """b [n_row] with the smallest |m b - y|^2 within e^-LOG_WEIGHT and e^LOG_WEIGHT: clamped least squares, then
    N_STEP projected gradients. m [n_query, n_row], y [n_query]."""
    bounds = math.exp(-LOG_WEIGHT), math.exp(LOG_WEIGHT)
    b = torch.linalg.lstsq(m, y[:, None], driver="gels").solution[:, 0].clamp(*bounds)
    step = 1 / torch.linalg.eigvalsh(m.T @ m)[-1]
    for _ in range(N_STEP):
        b = (b - step * (m.T @ (m @ b - y))).clamp(*bounds)
    return b


def compact_head(
    k: torch.Tensor, v: torch.Tensor, q: torch.Tensor, n_row: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and biases of n_row rows that answer the queries as k and v [n_token, head_dim] did; q [n_query,
    head_dim] has the scale of the logits in it."""
    q = q[:: -(-len(q) // N_QUERY)]
    blocks = q.split(N_BLOCK * 4)
    share2 = torch.zeros(len(k))
    for block in blocks:
        share2 += (block @ k.T).softmax(-1).square().sum(0)
    kept = share2.topk(min(n_row, len(k))).indices.sort().values
    x, y, out = [], [], []
    for block in blocks:
        scores = block @ k.T
        p = (scores - scores.max(-1, keepdim=True).values).exp()
        x.append(p[:, kept])
        y.append(p.sum(-1))
        out.append(p @ v / y[-1][:, None])
    m = torch.cat(x)
    weight = non_negative(m, torch.cat(y))
    m *= weight
    m /= m.sum(-1, keepdim=True).clamp_min(1e-30)
    return k[kept], torch.linalg.lstsq(m, torch.cat(out), driver="gels").solution, weight.log()


class Compaction:
    """A context manager with the attention of this file, and with the biases of the cache that it compacted."""

    def __init__(self, model: Any, rows: Sequence[Sequence[int]]):
        """rows: of each head, by layer."""
        self.model, self.rows = model, rows
        self.n_bytes = 0  # of the compacted cache with K, V and biases in f16

    def __enter__(self) -> Compaction:
        self.before = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAME)
        return self

    def __exit__(self, *_: Any) -> None:
        _watch.bias, _watch.queries = {}, None
        self.model.set_attn_implementation(self.before)

    def read(self, tokens: Sequence[int], repeat: Sequence[int]) -> DynamicCache:
        """The compacted cache of a text; `repeat`: the tokens of REPEAT."""
        cache = DynamicCache()
        read(self.model, tokens, cache)
        _watch.queries = {}
        read(self.model, [*repeat, *tokens], cache)
        queries, _watch.queries = _watch.queries, None
        for il, layer in enumerate(cache.layers):
            q = torch.cat(queries.pop(il), 2).flatten(1, 2)
            k, v = layer.keys[0, :, : len(tokens)], layer.values[0, :, : len(tokens)]
            n_most = max(self.rows[il])
            self.n_bytes += 2 * (k.shape[-1] + v.shape[-1] + 1) * sum(self.rows[il])
            keys, values = (torch.zeros(1, len(k), n_most, x.shape[-1]) for x in (k, v))
            bias = torch.full((len(k), n_most), EMPTY)
            for ih, n in enumerate(self.rows[il]):
                keys[0, ih, :n], values[0, ih, :n], bias[ih, :n] = compact_head(k[ih], v[ih], q[ih], n)
            layer.keys, layer.values, _watch.bias[il] = keys, values, bias
        return cache
