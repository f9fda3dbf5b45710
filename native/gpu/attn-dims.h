// attn-dims.h - what a device is told of attention

#pragma once

#include "attn-args.h"
#include "cpu/sc-attn.h"

#include <algorithm>

namespace semcache {

inline prop_attn_args device_attn_args(const attn_args & a, int n_part) {
    prop_attn_args g = {};
    g.n_head = a.n_head;
    g.n_head_kv = a.n_head_kv;
    g.n_tokens = a.n_tokens;
    g.n_kv = a.n_kv;
    g.n_sink = a.n_sink;
    g.n_part = n_part;
    g.k_type = (int) a.k_type;
    g.v_type = (int) a.v_type;
    g.k_cell_type = (int) a.k_cell_type;
    g.v_cell_type = (int) a.v_cell_type;
    g.k_rotated = a.k_rotated;
    g.mask_f16 = a.mask_f16;
    g.has_sinks = a.sinks != nullptr;
    g.scale = a.scale;
    g.softcap = a.softcap;
    g.q_head = a.q_head;
    g.q_token = a.q_token;
    g.k_head = a.k_head;
    g.k_cell = a.k_cell;
    g.v_head = a.v_head;
    g.v_cell = a.v_cell;
    g.mask_token = a.mask_token;
    return g;
}

// Parts that rows are cut into, so that n_group groups of queries fill a device that runs n_block blocks at once.
inline int device_parts(int n_block, int n_group) { return std::max(1, (n_block + n_group - 1) / n_group); }

} // namespace semcache
