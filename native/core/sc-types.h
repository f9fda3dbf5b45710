// sc-types.h - what the interfaces of native/core and native/cpu share

#pragma once

#include <cstdint>

namespace semcache {

enum class method { semantic = 0, paper = 1, streaming = 2, keydiff = 3, knorm = 4, snapkv = 5, tova = 6, h2o = 7 };

constexpr bool evicts(method m) { return m >= method::keydiff; } // by a policy of evict/

constexpr bool asks_queries(method m) {
    return m == method::semantic || m == method::snapkv || m == method::tova || m == method::h2o;
}

typedef uint16_t f16; // IEEE 754 binary16, as in ggml_fp16_t

constexpr int32_t Q_BLOCK = 32; // values that share a scale

// As ggml's block_q8_0: d*qs.
struct q8_block {
    f16 d;
    int8_t qs[Q_BLOCK];
};
static_assert(sizeof(q8_block) == 34, "no padding");

// As ggml's block_q5_0: d*(code - 16); the low four bits of a code lie as in a q4_block, the fifth of value i is bit i
// of qh.
struct q5_block {
    f16 d;
    uint8_t qh[Q_BLOCK / 8];
    uint8_t qs[Q_BLOCK / 2];
};
static_assert(sizeof(q5_block) == 22, "no padding");

// As ggml's block_q4_0, d*(code - 8), and block_iq4_nl, d*IQ4_NL[code]; value i in the low half of qs[i], value i + 16
// in the high half.
struct q4_block {
    f16 d;
    uint8_t qs[Q_BLOCK / 2];
};
static_assert(sizeof(q4_block) == 18, "no padding");

// What the codes of IQ4_NL stand for: steps that widen with the distance from zero, as values do that many channels add
// up to (ggml-common.h, kvalues_iq4nl).
alignas(16) constexpr int8_t IQ4_NL[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };

// How the rows of K or V are stored. Quantized rows are rotated first, keys in the frame of their head: see sc-quant.h.
enum class row_type : int32_t { f16 = 0, q8_0 = 1, q5_0 = 2, q4_0 = 3, iq4_nl = 4 };

// Bytes of a block of Q_BLOCK values.
constexpr int64_t block_size(row_type t) {
    switch (t) {
        case row_type::f16: return Q_BLOCK * (int64_t) sizeof(f16);
        case row_type::q8_0: return sizeof(q8_block);
        case row_type::q5_0: return sizeof(q5_block);
        default: return sizeof(q4_block);
    }
}

// Bytes of a row of d values; d is a whole number of blocks where the type has blocks.
constexpr int64_t row_size(row_type t, int64_t d) {
    return t == row_type::f16 ? d * (int64_t) sizeof(f16) : d / Q_BLOCK * block_size(t);
}

// Values of head_parts.
constexpr int64_t head_size(int64_t d_k, int64_t d_v, int64_t n_sink) { return 2 * d_k + n_sink * (d_k + d_v); }

// What a core stands for, in 32 bits: its chunk and its tokens.
constexpr int32_t N_CHUNK_MAX = 1 << 24;
constexpr int32_t origin_of(int32_t chunk, int32_t n_tok) {
    return (int32_t) ((uint32_t) chunk << 8 | (uint32_t) n_tok);
}
constexpr int32_t chunk_of(int32_t origin) { return (int32_t) ((uint32_t) origin >> 8); }
constexpr int32_t n_tok_of(int32_t origin) { return origin & 255; }

} // namespace semcache
