// ggml-prop-attn.h - GGML_OP_PROP_ATTN: attention over the compressed rows of every kv head and the cells of a KV cache
//
//     dst = sum_i p_i v_i,  p = softmax_i( softcap(scale q.k_i) + b_i ),  i over the head's cores and the cells
//
// with b_i the bias of a core, and the mask of a cell.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// Sources of the op, in this order.
enum ggml_prop_attn_src {
    GGML_PROP_ATTN_Q,
    GGML_PROP_ATTN_K,
    GGML_PROP_ATTN_V,
    GGML_PROP_ATTN_MASK,
    GGML_PROP_ATTN_CORE_K,
    GGML_PROP_ATTN_CORE_V,
    GGML_PROP_ATTN_BIAS,
    GGML_PROP_ATTN_ROWS,
    GGML_PROP_ATTN_SINKS,
};

// q       F32            [n_embd_head_k, n_head, n_tokens]
// k       F16            [n_embd_head_k, n_head_kv, n_kv]
// v       F16            [n_embd_head_v, n_head_kv, n_kv], or [n_kv, n_head_kv, n_embd_head_v] with nb[1] > nb[2]: a
//                        transposed cache, whose cells lie one after the other
// mask    F16 or F32     [n_kv, >= n_tokens], 0, -inf or a bias
// core_k  F16 Q8_0 Q4_0  [n_embd_head_k, n_row], contiguous; rows of the last two are rotated (native/core/sc-quant.h)
// core_v  F16 Q8_0 Q4_0  [n_embd_head_v, n_row], likewise
// bias    F32            [n_row]
// rows    I32            [n_head_kv, 2]: first row of every head, and its rows in use. Read when the op runs, so that a
// graph
//                        can be used again after they have changed
// sinks   F32            [n_head] logit of a row without a value, or NULL
// scale                  of the logits
// softcap                0: none
//
// Result: F32 [n_embd_head_v*n_head, n_tokens].
GGML_API struct ggml_tensor * ggml_prop_attn(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
    struct ggml_tensor * v, struct ggml_tensor * mask, struct ggml_tensor * core_k, struct ggml_tensor * core_v,
    struct ggml_tensor * bias, struct ggml_tensor * rows, struct ggml_tensor * sinks, float scale, float softcap);

#ifdef __cplusplus
}
#endif
