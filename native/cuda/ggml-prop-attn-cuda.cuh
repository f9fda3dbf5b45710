// ggml-prop-attn-cuda.cuh - what ggml-cuda calls for GGML_OP_PROP_ATTN

#pragma once

#include "common.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA) // where nobody has tried the kernels

static inline bool ggml_cuda_prop_attn_supported(const ggml_tensor *) { return false; }
static inline void ggml_cuda_prop_attn(ggml_backend_cuda_context &, ggml_tensor *) { GGML_ABORT("not supported"); }

#else

bool ggml_cuda_prop_attn_supported(const ggml_tensor * op);
void ggml_cuda_prop_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Of these, the kind GGML_PROP_ATTN_PASS.
void ggml_cuda_prop_attn_pass(ggml_backend_cuda_context & ctx, const ggml_tensor * dst);

#endif
