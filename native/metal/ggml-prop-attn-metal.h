// ggml-prop-attn-metal.h - what ggml-metal calls for GGML_OP_PROP_ATTN

#pragma once

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

// Compiles the kernels when it is asked for the first time; false, with a warning, if this device cannot.
bool ggml_metal_prop_attn_supported(ggml_metal_device_t dev, const struct ggml_tensor * op);

// Bytes that it works in behind the result.
size_t ggml_metal_prop_attn_extra(const struct ggml_tensor * op);

// Returns the number of nodes that it encoded: 1.
int ggml_metal_prop_attn(ggml_metal_device_t dev, ggml_metal_encoder_t enc, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
