// sc-types.h - what the interfaces of native/core and native/cpu share

#pragma once

#include <cstdint>

namespace semcache {

typedef uint16_t f16; // IEEE 754 binary16, as in ggml_fp16_t

} // namespace semcache
