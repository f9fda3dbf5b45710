// semcache-scope.cpp - which context gets a store: what is refused, and where upstream's constructors come by

#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"
#include "semcache-device.h"
#include "semcache-parts.h"

#include <algorithm>
#include <cstdlib>

namespace {

thread_local llama_semcache_scope * scope_active = nullptr;

// What SEMCACHE_TYPE_AUTO stands for (docs/decisions.md).
constexpr ggml_type TYPE_K = GGML_TYPE_IQ4_NL, TYPE_V = GGML_TYPE_IQ4_NL, TYPE_STAGE = GGML_TYPE_Q8_0;

// What an architecture has that keeps its cache from being compressed, whatever the model; NULL: nothing.
const char * arch_obstacle(llm_arch arch) {
    if (llm_arch_is_recurrent(arch)) {
        return "recurrent layers instead of a KV cache";
    }
    switch (arch) {
        case LLM_ARCH_BLOOM:
        case LLM_ARCH_REFACT:
        case LLM_ARCH_JAIS: return "ALiBi positions";
        case LLM_ARCH_T5:
        case LLM_ARCH_T5ENCODER: return "an encoder";
        case LLM_ARCH_DREAM:
        case LLM_ARCH_GEMMA_EMBEDDING:
        case LLM_ARCH_LLADA:
        case LLM_ARCH_LLADA_MOE:
        case LLM_ARCH_RND1: return "non-causal attention";
        case LLM_ARCH_GROK: return "logits that it caps in a way of its own";
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_EAGLE3:
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_DOTS3NOTE: return "a cache of its own kind";
        case LLM_ARCH_MINICPM3:
        case LLM_ARCH_PLM:
        case LLM_ARCH_DEEPSEEK2: return "multi-head latent attention (MLA), or heads of which RoPE turns the tail";
        default: return nullptr;
    }
}

// Why a model or context cannot be compressed, or "".
std::string obstacle(const llama_model & model, const llama_cparams & cparams, const llama_context_params & params) {
    const auto & h = model.hparams;
    if (const char * has = arch_obstacle(model.arch)) {
        return "an ordinary KV cache and RoPE or no positions, got " + model.arch_name() + ", which has " + has;
    }
    if (h.is_mla()) {
        return "K and V per head, got multi-head latent attention (MLA)";
    }
    if (h.f_max_alibi_bias > 0.0f) {
        return "RoPE or no positions, got ALiBi";
    }
    if (llama_model_has_encoder(&model) || !cparams.causal_attn) {
        return "a causal decoder, got an encoder or non-causal attention";
    }
    if (cparams.embeddings) {
        return "text generation, got embeddings mode";
    }
    if (cparams.n_seq_max > 1) {
        return "one sequence (n_seq_max = 1), got " + std::to_string(cparams.n_seq_max);
    }
    if (params.type_k != GGML_TYPE_F16 || params.type_v != GGML_TYPE_F16) {
        return std::string("type_k = type_v = f16, got ") + ggml_type_name(params.type_k) + " and " +
               ggml_type_name(params.type_v);
    }
    if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || cparams.ctx_other) {
        return "a plain context, got one for drafting";
    }
    if (h.indexer_top_k > 0 || h.indexer_head_size > 0) {
        return "dense attention, got sparse attention with an indexer";
    }
    return "";
}

// Layers whose cache is compressed: those that attend to all tokens.
bool is_compressed(const llama_hparams & h, uint32_t il) { return h.n_head_kv(il) > 0 && !h.is_swa(il); }

// Type that SEMCACHE_TYPE_AUTO stands for: the given one where all heads of the compressed layers are whole blocks of
// it.
int32_t resolve_type(int32_t type, ggml_type best, const llama_hparams & h) {
    if (type != SEMCACHE_TYPE_AUTO) {
        return type;
    }
    const int64_t block = ggml_blck_size(best);
    for (uint32_t il = 0; il < h.n_layer(); ++il) {
        if (is_compressed(h, il) && (h.n_embd_head_k(il) % block || h.n_embd_head_v(il) % block)) {
            return GGML_TYPE_F16;
        }
    }
    return best;
}

// What it stands for in the stage. Keys of 8 bits are good enough if they are rotated, which llama.cpp does where heads
// are multiples of 64 values and nobody forbids it (llama_kv_cache::attn_rot_k).
int32_t resolve_stage_type(const semcache_params & p, const llama_cparams & cparams, const llama_hparams & h) {
    const char * forbidden = getenv("LLAMA_ATTN_ROT_DISABLE");
    bool rotates = cparams.flash_attn && !p.calibrate && !(forbidden && atoi(forbidden));
    for (uint32_t il = 0; il < h.n_layer(); ++il) {
        rotates = rotates && ((il > 0 && !is_compressed(h, il)) || h.n_embd_head_k(il) % 64 == 0);
    }
    return resolve_type(p.type_stage, rotates ? TYPE_STAGE : GGML_TYPE_F16, h);
}

// A cell of the cache and a row hold whole blocks of every head.
void check_type(const char * name, int32_t type, const llama_hparams & h) {
    const int64_t block = ggml_blck_size((ggml_type) type);
    for (uint32_t il = 0; il < h.n_layer(); ++il) {
        for (const int64_t d : { (int64_t) h.n_embd_head_k(il), (int64_t) h.n_embd_head_v(il) }) {
            if (is_compressed(h, il) && d % block != 0) {
                throw semcache_error(SEMCACHE_ERR_MODEL,
                    std::string(name) + ": expected f16 for heads of " + std::to_string(d) + " values, as in layer " +
                        std::to_string(il) + ", got " + ggml_type_name((ggml_type) type) + ", whose blocks have " +
                        std::to_string(block) + "; use f16");
            }
        }
    }
}

} // namespace

llama_semcache_scope::llama_semcache_scope(llama_context & lctx, const llama_model & model, llama_cparams & cparams,
    const llama_context_params & params) : lctx(lctx), model(model), cparams(cparams), config(semcache_take_pending()) {
    if (!config) {
        return;
    }
    auto & p = config->params;
    const std::string why = obstacle(model, cparams, params);
    if (!why.empty()) {
        throw semcache_error(SEMCACHE_ERR_MODEL,
            "compressing the KV cache: expected " + why + "; use this model or mode without compression");
    }
    const int64_t n_ctx = GGML_PAD((int64_t) cparams.n_ctx, 256);
    if (model.pos_embd && n_ctx > model.pos_embd->ne[1]) { // llama.cpp aborts when it looks up one behind
        throw semcache_error(SEMCACHE_ERR_ARGUMENT,
            "n_ctx: expected at most the " + std::to_string(model.pos_embd->ne[1]) +
                " positions that this model has, got " + std::to_string(n_ctx) + "; lower n_ctx");
    }
    if (p.n_stage > n_ctx) {
        throw semcache_error(SEMCACHE_ERR_ARGUMENT, "n_stage: expected at most n_ctx = " + std::to_string(n_ctx) +
                                                        ", got " + std::to_string(p.n_stage) +
                                                        "; raise n_ctx or lower n_stage");
    }
    if (cparams.n_rs_seq > (uint32_t) p.n_window) { // recurrent states could go back to where the stage has nothing
        throw semcache_error(
            SEMCACHE_ERR_ARGUMENT, "n_rs_seq: expected at most n_window = " + std::to_string(p.n_window) + ", got " +
                                       std::to_string(cparams.n_rs_seq) + "; lower it or raise n_window");
    }
    // a batch may be as large as it likes: a pass comes before each ubatch that has no room, and frees as much at the
    // most, one row besides the sinks included
    cparams.n_ubatch = std::min(cparams.n_ubatch, (uint32_t) (p.n_stage - std::max(p.n_window, p.n_sink)));
    if (!cparams.flash_attn && p.type_stage != SEMCACHE_TYPE_AUTO && p.type_stage != GGML_TYPE_F16) {
        throw semcache_error(SEMCACHE_ERR_ARGUMENT,
            std::string(
                "type_stage: expected f16 without flash attention, since values then lie along the cells, got ") +
                ggml_type_name((ggml_type) p.type_stage) + "; use f16 or flash attention");
    }
    p.type_k = resolve_type(p.type_k, TYPE_K, model.hparams);
    p.type_v = resolve_type(p.type_v, TYPE_V, model.hparams);
    p.type_stage = resolve_stage_type(p, cparams, model.hparams);
    check_type("type_k", p.type_k, model.hparams);
    check_type("type_v", p.type_v, model.hparams);
    check_type("type_stage", p.type_stage, model.hparams);
    // rows that a device cannot attend to would be copied from it for every token: they stay where the CPU reads them;
    // without flash attention values lie along the cells, which no device's kernels read
    for (uint32_t il = 0; cparams.offload_kqv && il < model.hparams.n_layer(); ++il) {
        ggml_backend_dev_t dev = model.dev_layer(il);
        if (is_compressed(model.hparams, il) &&
            (p.calibrate || !cparams.flash_attn || !semcache_device_attends(dev, model.hparams, il, p))) {
            LLAMA_LOG_INFO("%s: the KV cache stays in host memory: %s has no attention over cores, or no calibration\n",
                __func__, ggml_backend_dev_name(dev));
            cparams.offload_kqv = false;
        }
    }
    scope_active = this;
}

llama_semcache_scope::~llama_semcache_scope() {
    if (scope_active == this) {
        scope_active = nullptr;
    }
}

void llama_semcache_scope::finish() const {
    if (config && !attached) {
        throw semcache_error(
            SEMCACHE_ERR_MODEL, "compressing the KV cache: expected a model with full-attention layers, got " +
                                    model.arch_name() + " without; use it without compression");
    }
}

static bool takes_store(llama_swa_type swa_type, const void * other) {
    return scope_active && scope_active->config && !scope_active->attached && swa_type == LLAMA_SWA_TYPE_NONE && !other;
}

void semcache_shape_cache(
    uint32_t & kv_size, ggml_type & type_k, ggml_type & type_v, llama_swa_type swa_type, const void * other) {
    if (takes_store(swa_type, other)) {
        kv_size = (uint32_t) scope_active->config->params.n_stage;
        type_k = type_v = (ggml_type) scope_active->config->params.type_stage;
    }
}

std::shared_ptr<llama_semcache> semcache_attach(
    llama_kv_cache & kv, llama_swa_type swa_type, const void * other, bool v_trans) {
    if (!takes_store(swa_type, other) || kv.get_layer_ids().empty()) {
        return nullptr;
    }
    auto store = std::make_shared<llama_semcache>(std::make_unique<llama_semcache::parts>(kv, *scope_active, v_trans));
    scope_active->attached = true;
    return store;
}

const char * semcache_arch_obstacle(const char * arch) {
    return arch ? arch_obstacle(llm_arch_from_string(arch)) : nullptr;
}

//
// finding the store
//

const llama_kv_cache_context * semcache_find(const llama_memory_context_i * mctx) {
    const llama_kv_cache_context * res = nullptr;
    if (const auto * c = dynamic_cast<const llama_kv_cache_context *>(mctx)) {
        res = c;
    } else if (const auto * c = dynamic_cast<const llama_kv_cache_iswa_context *>(mctx)) {
        res = c->get_base();
    } else if (const auto * c = dynamic_cast<const llama_memory_hybrid_context *>(mctx)) {
        res = c->get_attn();
    } else if (const auto * c = dynamic_cast<const llama_memory_hybrid_iswa_context *>(mctx)) {
        res = c->get_attn()->get_base();
    }
    return res && res->get_semcache() ? res : nullptr;
}

llama_semcache * semcache_find(llama_memory_i * memory) {
    const llama_kv_cache * kv = nullptr;
    if (auto * m = dynamic_cast<llama_kv_cache *>(memory)) {
        kv = m;
    } else if (auto * m = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        kv = m->get_base();
    } else if (auto * m = dynamic_cast<llama_memory_hybrid *>(memory)) {
        kv = m->get_mem_attn();
    } else if (auto * m = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        kv = m->get_mem_attn()->get_base();
    }
    return kv ? kv->semcache.get() : nullptr;
}

// The memory has a store: says so as the last error.
static bool refuse(const char * func, const std::string & message) {
    semcache_set_error(SEMCACHE_ERR_STATE, message);
    LLAMA_LOG_ERROR("%s: %s\n", func, message.c_str());
    return true;
}

bool semcache_refuses_non_causal(llama_memory_i * memory, const llama_cparams & cparams) {
    return !cparams.causal_attn && semcache_find(memory) &&
           refuse(__func__, "batch: expected causal attention, got non-causal, as for a picture, which a compressed KV "
                            "cache cannot hold; leave pictures out, or load the model without compression");
}

bool semcache_refuses(llama_memory_i * memory, const char * what) {
    return semcache_find(memory) &&
           refuse(__func__, std::string(what) + ": expected an uncompressed KV cache, got a compressed one, whose only "
                                                "sequence stays where it is; clear it instead");
}
