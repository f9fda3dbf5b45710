// ggml-prop-attn-cpu.h - what ggml-cpu calls for GGML_OP_PROP_ATTN

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Bytes of work buffer that the op needs on n_tasks threads.
size_t ggml_prop_attn_work_size(const struct ggml_tensor * dst, int n_tasks);

void ggml_compute_forward_prop_attn(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
