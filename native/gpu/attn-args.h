// attn-args.h - sizes, types and strides of attention, for device and host

#pragma once

#include "row-size.h"

struct prop_attn_args {
    int n_head, n_head_kv, n_tokens, n_kv, n_sink, n_part;
    int k_type, v_type;           // of the cores
    int k_cell_type, v_cell_type; // of the stage: f16 or q8_0
    int k_rotated;                // q, keys of the stage and of the sinks are rotated
    int mask_f16, has_sinks;      // sinks: logits without a value
    float scale, softcap;
    sc_i64 q_head, q_token;                // in floats
    sc_i64 k_head, k_cell, v_head, v_cell; // in bytes
    sc_i64 mask_token;                     // in elements
};
