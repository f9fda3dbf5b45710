// sc-types.h - what the interfaces of native/core and native/cpu share

#pragma once

#include <cstdint>

namespace semcache {

typedef uint16_t f16; // IEEE 754 binary16, as in ggml_fp16_t

constexpr int32_t Q8_BLOCK = 32;

// 32 values with a common scale, as ggml's block_q8_0.
struct q8_block {
    f16    d;
    int8_t qs[Q8_BLOCK];
};
static_assert(sizeof(q8_block) == 34, "no padding");

} // namespace semcache
