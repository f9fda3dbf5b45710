// ggml-prop-attn.h - GGML_OP_PROP_ATTN: attention over the compressed rows of every kv head and the cells of a KV
// cache, and what makes such rows
//
// The op has kinds. Attention, of one layer:
//
//     dst = sum_i p_i v_i,  p = softmax_i( softcap(scale q.k_i) + b_i ),  i over the head's sinks and cores and the
//     cells
//
// with b_i the bias of a core, the mask of a cell, and 0 for a sink.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// Kind of the op, its first parameter.
enum ggml_prop_attn_kind {
    GGML_PROP_ATTN_ATTEND,
    GGML_PROP_ATTN_PASS,
    GGML_PROP_ATTN_CALIBRATE,
};

// Sources of attention, in this order.
enum ggml_prop_attn_src {
    GGML_PROP_ATTN_Q,
    GGML_PROP_ATTN_K,
    GGML_PROP_ATTN_V,
    GGML_PROP_ATTN_MASK,
    GGML_PROP_ATTN_CORE_K,
    GGML_PROP_ATTN_CORE_V,
    GGML_PROP_ATTN_BIAS,
    GGML_PROP_ATTN_ROWS,
    GGML_PROP_ATTN_HEADS,
    GGML_PROP_ATTN_SINKS,
};

// q       F32            [n_embd_head_k, n_head, n_tokens]
// k       F16 Q8_0       [n_embd_head_k, n_head_kv, n_kv]
// v       F16 Q8_0       [n_embd_head_v, n_head_kv, n_kv], or F16 [n_kv, n_head_kv, n_embd_head_v] with nb[1] >
//                        nb[2]: a transposed cache, whose cells lie one after the other
// mask    F16 or F32     [n_kv, >= n_tokens], 0, -inf or a bias
// core_k  any of         [n_embd_head_k, n_row], contiguous; F16, or Q8_0, Q5_0, Q4_0, IQ4_NL, whose rows are rotated
//                        (native/core/sc-quant.h) and, those of K, in the frame of their head
// core_v  likewise       [n_embd_head_v, n_row], likewise
// bias    F16            [n_row]
// rows    I32            [n_head_kv, 2]: first row of every head, and its rows in use, of which the first n_sink are
//                        sinks: nothing is read of those in core_k, core_v and bias. Read when the op runs, so that a
//                        graph can be used again after they have changed
// heads   F16            [2*n_embd_head_k + n_sink*(n_embd_head_k + n_embd_head_v), n_head_kv]: of every head the mean
//                        and the scale of its keys' frame, then K and V of its sinks (head_parts in sc-quant.h)
// sinks   F32            [n_head] logit of a row without a value, or NULL
// scale                  of the logits
// softcap                0: none
// k_rotated              q, k and K of the sinks are rotated as in llama.cpp's quantized caches: sc-quant.h, hadamard()
//
// Result: F32 [n_embd_head_v*n_head, n_tokens].
GGML_API struct ggml_tensor * ggml_prop_attn(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
    struct ggml_tensor * v, struct ggml_tensor * mask, struct ggml_tensor * core_k, struct ggml_tensor * core_v,
    struct ggml_tensor * bias, struct ggml_tensor * rows, struct ggml_tensor * heads, struct ggml_tensor * sinks,
    float scale, float softcap, bool k_rotated);

// Sinks that a tensor `heads` holds.
GGML_API int64_t ggml_prop_attn_n_sink(int64_t n_embd_head_k, int64_t n_embd_head_v, const struct ggml_tensor * heads);

// The other kinds work on all kv heads of the layers in one backend's memory. They have no sources but a task of
// native/pass/task.h, which stays where it is, in host memory; it and what it points to are read and written when the
// op runs.
//
// GGML_PROP_ATTN_PASS       struct pass_task       moves the stage into the cores
// GGML_PROP_ATTN_CALIBRATE  struct calibrate_task  measures what a head's output is off by when it holds fewer rows
//
// rows    of one of the layers: the result is a view of it, so that the backend finds it in memory of its own
// serial  another one for every task: a backend may keep a graph and run it again where all nodes look the same
GGML_API struct ggml_tensor * ggml_prop_attn_task(struct ggml_context * ctx, enum ggml_prop_attn_kind kind,
    const void * task, struct ggml_tensor * rows, int32_t serial);

// The task of such a node.
GGML_API const void * ggml_prop_attn_get_task(const struct ggml_tensor * dst);

GGML_API enum ggml_prop_attn_kind ggml_prop_attn_get_kind(const struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
