// attn-args.h - what the kernels of attention are given and what a block of theirs shares, for device and host

#pragma once

#include "row-size.h"

// Sizes, types and strides.
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

struct prop_attn_src {
    SC_GLOBAL const float * q; // [D, n_head, n_tokens]
    SC_GLOBAL const uchar *k, *v, *mask, *core_k, *core_v;
    SC_GLOBAL const sc_half *bias, *heads; // [n_row]; see head_parts of core/sc-quant.h
    SC_GLOBAL const int * rows;            // [2, n_head_kv] first row of each head, rows in use
    SC_GLOBAL const float * sinks;         // [n_head]
};

// From one row of a tile to the next: neighbours begin in different banks.
#define SC_TILE_LD(d) ((d) + 2)

// Rows of a tile: what a block shares stays below 32 KiB.
#define SC_TILE(D) ((D) > 128 ? 32 : 64)

// Shared memory of a block by offsets in bytes.
template <int D, int NQ> struct prop_attn_shared {
    enum {
        NL = 0,                           // [16] what the codes of IQ4_NL stand for
        Q = NL + 4 * 16,                  // [NQ, D] queries
        Q_CORE = Q + 4 * NQ * D,          // [NQ, D] as they meet the cores
        O = Q_CORE + 4 * NQ * D,          // [NQ, D] sums of values
        X = O + 4 * NQ * D,               // [NQ, SC_TILE] a tile's shares
        FACTOR = X + 4 * NQ * SC_TILE(D), // [NQ] what the sums so far are multiplied by
        MAX = FACTOR + 4 * NQ,            // [NQ] of the logits so far
        SUM = MAX + 4 * NQ,               // [NQ] of the shares so far
        SHIFT = SUM + 4 * NQ,             // [NQ] what the mean of the cores' keys adds to their logits
        TILE = SHIFT + 4 * NQ,            // [SC_TILE, SC_TILE_LD] f16
        SIZE = TILE + 2 * SC_TILE(D) * SC_TILE_LD(D),
    };
};

// Of prop-attn-many.h.
#define SC_MANY_ROWS 64 // query rows of a block: 16 of each warp

template <int D> struct prop_attn_many_shared {
    enum {
        TILE = SC_TILE(D),
        LD = D + 8, // rows begin at multiples of 16 bytes, neighbours in different banks
        TILE_SIZE = 2 * TILE * LD,
        FLOATS_SIZE = 4 * 16 * D,
        NL = 0,                           // [16] what the codes of IQ4_NL stand for
        SHIFT = NL + 4 * 16,              // [SC_MANY_ROWS] what the mean of the cores' keys adds to their logits
        Q = SHIFT + 4 * SC_MANY_ROWS,     // [SC_MANY_ROWS, LD] queries, f16
        ROWS = Q + 2 * SC_MANY_ROWS * LD, // [TILE, LD] f16, or a warp's queries or sums [16, D] to be rotated
        SIZE = ROWS + (TILE_SIZE > FLOATS_SIZE ? TILE_SIZE : FLOATS_SIZE),
    };
};
