// ggml-prop-attn-vulkan.h - what ggml-vulkan.cpp calls for GGML_OP_PROP_ATTN
//
// The bodies are in ggml-prop-attn-vulkan.inc, which that file includes at its end, since they use functions of its
// own.

#pragma once

static bool ggml_vk_prop_attn_supported(const vk_device & device, const ggml_tensor * op);
static void ggml_vk_prop_attn(ggml_backend_vk_context * ctx, vk_context & subctx, ggml_tensor * dst);
