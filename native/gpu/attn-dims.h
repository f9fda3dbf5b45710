// attn-dims.h - what a device is told of attention, from a node of ggml

#pragma once

#include "attn-args.h"
#include "ggml-impl.h"
#include "ggml-prop-attn.h"

namespace semcache {

// -1: not for the kernels.
inline int device_type(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16: return SC_F16;
        case GGML_TYPE_Q8_0: return SC_Q8_0;
        case GGML_TYPE_Q5_0: return SC_Q5_0;
        case GGML_TYPE_Q4_0: return SC_Q4_0;
        case GGML_TYPE_IQ4_NL: return SC_IQ4_NL;
        default: return -1;
    }
}

// All but n_part.
inline prop_attn_args device_attn_args(const ggml_tensor * dst) {
    const ggml_tensor *q = dst->src[GGML_PROP_ATTN_Q], *k = dst->src[GGML_PROP_ATTN_K], *v = dst->src[GGML_PROP_ATTN_V];
    const ggml_tensor *mask = dst->src[GGML_PROP_ATTN_MASK], *core_v = dst->src[GGML_PROP_ATTN_CORE_V];
    prop_attn_args a = {};
    a.n_head = (int) q->ne[1];
    a.n_head_kv = (int) k->ne[1];
    a.n_tokens = (int) q->ne[2];
    a.n_kv = (int) k->ne[2];
    a.n_sink = (int) ggml_prop_attn_n_sink(q->ne[0], core_v->ne[0], dst->src[GGML_PROP_ATTN_HEADS]);
    a.k_type = device_type(dst->src[GGML_PROP_ATTN_CORE_K]->type);
    a.v_type = device_type(core_v->type);
    a.k_cell_type = device_type(k->type);
    a.v_cell_type = device_type(v->type);
    a.scale = ggml_get_op_params_f32(dst, 1);
    a.softcap = ggml_get_op_params_f32(dst, 2);
    a.k_rotated = ggml_get_op_params_i32(dst, 3);
    a.mask_f16 = mask->type == GGML_TYPE_F16;
    a.has_sinks = dst->src[GGML_PROP_ATTN_SINKS] != nullptr;
    a.q_head = (sc_i64) (q->nb[1] / sizeof(float));
    a.q_token = (sc_i64) (q->nb[2] / sizeof(float));
    a.k_head = (sc_i64) k->nb[1];
    a.k_cell = (sc_i64) k->nb[2];
    a.v_head = (sc_i64) v->nb[1];
    a.v_cell = (sc_i64) v->nb[2];
    a.mask_token = (sc_i64) (mask->nb[1] / ggml_type_size(mask->type));
    return a;
}

} // namespace semcache
