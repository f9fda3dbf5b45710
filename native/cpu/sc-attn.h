// sc-attn.h - proportional attention on the CPU: one softmax over the cores of a head and the stage
//
//     out = sum_i p_i v_i,  p = softmax_i( softcap(scale q.k_i) + bias_i ),  i over the head's sinks and cores and the
//     stage's cells
//
// with the bias of a core as stored, 0 for a sink, and that of a cell from the mask. A K or V row is read and converted
// once for several query heads of its group, not for each of them. The work is cut the same way whatever the number of
// threads, so the result does not depend on it.

#pragma once

#include "sc-types.h"

#include <cstdint>

namespace semcache {

// All tensors of one attention call. Strides are in elements, those of the stage in bytes.
struct attn_args {
    int32_t n_embd_head_k;
    int32_t n_embd_head_v;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_tokens;
    int32_t n_kv; // cells of the stage that the mask covers
    float scale;
    float softcap;  // 0: none
    bool k_rotated; // q, k and K of the sinks are rotated

    const float * q;
    int64_t q_head, q_token; // [n_embd_head_k, n_head, n_tokens]
    const uint8_t * k;
    row_type k_cell_type;   // f16 or q8_0
    int64_t k_head, k_cell; // [n_embd_head_k, n_head_kv, n_kv]
    const uint8_t * v;
    row_type v_cell_type;           // likewise; f16 if the values lie along the cells
    int64_t v_head, v_cell, v_elem; // [n_embd_head_v, n_head_kv, n_kv], any order in memory; v_elem of f16 alone
    const void * mask;
    bool mask_f16;
    int64_t mask_token;  // [n_kv, n_tokens] f16 or f32, 0 or -inf (or a bias)
    const float * sinks; // [n_head] logits of a sink without a value, or NULL

    const uint8_t * k_core;
    row_type k_type; // [n_embd_head_k, n_row]
    const uint8_t * v_core;
    row_type v_type;           // [n_embd_head_v, n_row]
    const f16 * bias;          // [n_row]
    int32_t n_row;             // allocated, of all heads
    const int32_t * row_first; // [n_head_kv] first row of each head
    const int32_t * row_count; // [n_head_kv] rows in use; the first n_sink of them are sinks
    const f16 * heads;         // [n_head_kv, head_size] see head_parts
    int32_t n_sink;

    bool v_trans() const { return v_elem > (int64_t) sizeof(f16); }
};

// Floats of scratch for all nth threads together. Needs the sizes and types of `a` only.
int64_t attn_work_size(const attn_args & a, int nth);

// Whether the rows of all heads are cut into parts, as for a few tokens: then all threads must be through with
// attn_part() before the first calls attn_reduce().
bool attn_in_parts(const attn_args & a);

// Thread ith of nth does its share: of the result dst [n_embd_head_v, n_head, n_tokens], or of the parts in `work`.
void attn_part(const attn_args & a, float * work, float * dst, int ith, int nth);

// Combines the parts into dst.
void attn_reduce(const attn_args & a, const float * work, float * dst, int ith, int nth);

} // namespace semcache
