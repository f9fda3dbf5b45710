// row-size.h - how rows of the cache are stored, for device and host

#pragma once

#include "sc-gpu-words.h"

// As semcache::row_type; the blocks are ggml's, see core/sc-types.h.
enum { SC_F16 = 0, SC_Q8_0 = 1, SC_Q5_0 = 2, SC_Q4_0 = 3, SC_IQ4_NL = 4 };

#define SC_THREADS 128 // of a block
#define SC_Q_BLOCK 32  // values that share a scale

SC_BOTH sc_i64 sc_block_size(int type) {
    return type == SC_F16 ? 64 : type == SC_Q8_0 ? 34 : type == SC_Q5_0 ? 22 : 18;
}

// Bytes of a row of d values.
SC_BOTH sc_i64 sc_row_size(int type, int d) { return type == SC_F16 ? 2 * d : d / SC_Q_BLOCK * sc_block_size(type); }
