// ggml-prop-attn-args.h - a node of attention as kernels see it, whatever the backend
//
// For backends: needs ggml's private ggml-impl.h.

#pragma once

#include "cpu/sc-attn.h"
#include "ggml-impl.h"
#include "ggml-prop-attn.h"
#include "ggml-row-type.h"

namespace semcache {

// Pointers are those of the tensors, in whatever memory these are.
inline attn_args attn_args_of(const ggml_tensor * dst) {
    const ggml_tensor *q = dst->src[GGML_PROP_ATTN_Q], *k = dst->src[GGML_PROP_ATTN_K], *v = dst->src[GGML_PROP_ATTN_V];
    const ggml_tensor *mask = dst->src[GGML_PROP_ATTN_MASK], *rows = dst->src[GGML_PROP_ATTN_ROWS],
                      *heads = dst->src[GGML_PROP_ATTN_HEADS], *sinks = dst->src[GGML_PROP_ATTN_SINKS];
    const ggml_tensor *core_k = dst->src[GGML_PROP_ATTN_CORE_K], *core_v = dst->src[GGML_PROP_ATTN_CORE_V];
    const bool v_trans = v->nb[1] > v->nb[2];
    attn_args a = {};
    a.n_embd_head_k = (int32_t) q->ne[0];
    a.n_embd_head_v = (int32_t) core_v->ne[0];
    a.n_head = (int32_t) q->ne[1];
    a.n_head_kv = (int32_t) k->ne[1];
    a.n_tokens = (int32_t) q->ne[2];
    a.n_kv = (int32_t) k->ne[2];
    a.scale = ggml_get_op_params_f32(dst, 1);
    a.softcap = ggml_get_op_params_f32(dst, 2);
    a.k_rotated = ggml_get_op_params_i32(dst, 3) != 0;
    a.q = (const float *) q->data;
    a.q_head = q->nb[1] / sizeof(float);
    a.q_token = q->nb[2] / sizeof(float);
    a.k = (const uint8_t *) k->data;
    a.k_cell_type = row_type_of(k->type);
    a.k_head = k->nb[1];
    a.k_cell = k->nb[2];
    a.v = (const uint8_t *) v->data;
    a.v_cell_type = row_type_of(v->type);
    a.v_head = v->nb[1];
    a.v_cell = v_trans ? sizeof(f16) : v->nb[2];
    a.v_elem = v_trans ? v->nb[2] : sizeof(f16);
    a.mask = mask->data;
    a.mask_f16 = mask->type == GGML_TYPE_F16;
    a.mask_token = mask->nb[1] / ggml_type_size(mask->type);
    a.sinks = sinks ? (const float *) sinks->data : nullptr;
    a.k_core = (const uint8_t *) core_k->data;
    a.k_type = row_type_of(core_k->type);
    a.v_core = (const uint8_t *) core_v->data;
    a.v_type = row_type_of(core_v->type);
    a.bias = (const f16 *) dst->src[GGML_PROP_ATTN_BIAS]->data;
    a.n_row = (int32_t) core_k->ne[1];
    a.row_first = (const int32_t *) rows->data;
    a.row_count = (const int32_t *) rows->data + a.n_head_kv;
    a.heads = (const f16 *) heads->data;
    a.n_sink = (int32_t) ggml_prop_attn_n_sink(a.n_embd_head_k, a.n_embd_head_v, heads);
    return a;
}

// Head size of a node of attention that kernels can read: that of K and V, whose values do not lie along the cells; 0
// of others.
inline int64_t device_head_size(const ggml_tensor * op) {
    const ggml_tensor *q = op->src[GGML_PROP_ATTN_Q], *v = op->src[GGML_PROP_ATTN_V];
    return q->ne[0] == op->src[GGML_PROP_ATTN_CORE_V]->ne[0] && v->nb[1] <= v->nb[2] ? q->ne[0] : 0;
}

} // namespace semcache
