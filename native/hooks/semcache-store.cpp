#include "semcache-store.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-model.h"
#include "sc-calibrate.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <map>
#include <numeric>
#include <thread>

using semcache::f16;

namespace {

constexpr uint32_t STATE_MAGIC   = 0x6d657363; // "csem": no stock cache state begins with so many streams
constexpr uint32_t STATE_VERSION = 6;

// Fits core_meta::chunk; every delimiter takes a chunk id, which is free again when the text is cut before it.
constexpr int32_t N_CHUNK_MAX = 1 << 24;

thread_local llama_semcache_scope * scope_active = nullptr;

// Angles per position of a layer's RoPE, as ggml_rope_ext turns them (ggml-cpu/ops.cpp, rope_yarn): linear in the position.
semcache::rope rope_of_layer(const llama_model & model, const llama_cparams & cparams, uint32_t il) {
    const auto & hparams = model.hparams;
    semcache::rope r;
    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE || !hparams.has_rope(il)) {
        return r;
    }
    const int32_t n_rot      = (int32_t) hparams.n_rot(il);
    const float   freq_base  = model.get_rope_freq_base (cparams, il);
    const float   freq_scale = model.get_rope_freq_scale(cparams, il);

    r.neox = hparams.rope_type == LLAMA_ROPE_TYPE_NEOX;
    r.inv_freq.resize(n_rot/2);

    std::vector<float> factors(n_rot/2, 1.0f);
    if (const ggml_tensor * t = model.get_rope_factors(cparams, il)) {
        ggml_backend_tensor_get(t, factors.data(), 0, factors.size()*sizeof(float));
    }

    float corr[2] = { 0.0f, 0.0f };
    ggml_rope_yarn_corr_dims(n_rot, cparams.n_ctx_orig_yarn, freq_base, cparams.yarn_beta_fast, cparams.yarn_beta_slow, corr);
    for (int32_t i = 0; i < n_rot/2; ++i) {
        const double extrap = std::pow((double) freq_base, -2.0*i/n_rot)/factors[i];
        const double y      = ((double) i - corr[0])/std::max(0.001f, corr[1] - corr[0]);
        const double mix    = (1.0 - std::clamp(y, 0.0, 1.0))*cparams.yarn_ext_factor;
        r.inv_freq[i] = (float) (freq_scale*extrap*(1.0 - mix) + extrap*mix);
    }
    return r;
}

semcache::row_type row_type_of(int32_t type) {
    return type == GGML_TYPE_Q8_0 ? semcache::row_type::q8_0 : type == GGML_TYPE_Q4_0 ? semcache::row_type::q4_0 : semcache::row_type::f16;
}

// Bytes of a tensor in its buffer.
size_t allocated(const ggml_tensor * t) {
    const auto buft = ggml_backend_buffer_get_type(t->buffer);
    return GGML_PAD(ggml_backend_buft_get_alloc_size(buft, t), ggml_backend_buft_get_alignment(buft));
}

// Why a model or context cannot be compressed, or "".
std::string obstacle(const llama_model & model, const llama_cparams & cparams, const llama_context_params & params) {
    const auto & h = model.hparams;
    if (llm_arch_is_recurrent(model.arch)) {
        return "a model with a KV cache, got a recurrent one";
    }
    if (h.is_mla()) {
        return "K and V per head, got multi-head latent attention (MLA)";
    }
    if (h.f_max_alibi_bias > 0.0f) {
        return "RoPE or no positions, got ALiBi";
    }
    if (h.n_pos_per_embd() > 1) {
        return "one position per token, got M-RoPE";
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
        return std::string("type_k = type_v = f16, got ") + ggml_type_name(params.type_k) + " and " + ggml_type_name(params.type_v);
    }
    if (h.n_layer_kv_from_start >= 0) {
        return "K and V of its own in every layer, got " + model.arch_name() + ", whose layers may share them";
    }
    if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || cparams.ctx_other) {
        return "a plain context, got one for drafting";
    }
    if (h.indexer_top_k > 0 || h.indexer_head_size > 0) {
        return "dense attention, got sparse attention with an indexer";
    }
    switch (model.arch) {
        case LLM_ARCH_GROK:       // caps its logits in a way of its own
        case LLM_ARCH_MINIMAX_M3: // these bring caches of their own
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_EAGLE3:
        case LLM_ARCH_MINICPM3:   // these rotate the tail of a head
        case LLM_ARCH_PLM:
        case LLM_ARCH_DEEPSEEK2:
            return "an architecture with the ordinary KV cache and RoPE, got " + model.arch_name();
        default:
            return "";
    }
}

// Calls f(job, thread) for every job, and at the end throws again what one of them threw. Thread i gets no job before i, the main
// thread is 0. Does not fail for want of memory itself: rows may have been written already.
template <typename F> void run_jobs(size_t n_jobs, int32_t n_threads, F && f) {
    std::atomic<size_t> next { (size_t) n_threads };
    std::atomic_flag    failed = ATOMIC_FLAG_INIT;
    std::exception_ptr  error;
    auto work = [&](size_t first, int32_t ith) {
        try {
            for (size_t i = first; i < n_jobs; i = next.fetch_add(1)) {
                f(i, ith);
            }
        } catch (...) {
            if (!failed.test_and_set()) {
                error = std::current_exception();
            }
        }
    };
    std::vector<std::thread> threads;
    try {
        threads.reserve(n_threads);
        for (int32_t i = 1; i < n_threads; ++i) {
            threads.emplace_back(work, i, i);
        }
    } catch (const std::exception &) {
        // fewer threads do the same work
    }
    work(0, 0);
    for (size_t i = threads.size() + 1; i < (size_t) n_threads; ++i) {
        work(i, 0);
    }
    for (auto & t : threads) {
        t.join();
    }
    if (error) {
        std::rethrow_exception(error);
    }
}

template <typename T> void write_vector(llama_io_write_i & io, const std::vector<T> & v) {
    const uint64_t n = v.size();
    io.write(&n, sizeof(n));
    io.write(v.data(), n*sizeof(T));
}

template <typename T> void read_vector(llama_io_read_i & io, std::vector<T> & v, uint64_t n_max) {
    uint64_t n;
    io.read(&n, sizeof(n));
    if (n > n_max) {
        throw semcache_error(SEMCACHE_ERR_IO, "state: expected at most " + std::to_string(n_max) + " entries, got " +
                std::to_string(n) + "; the file is damaged");
    }
    v.resize(n);
    io.read(v.data(), n*sizeof(T));
}

} // namespace

//
// llama_semcache_scope
//

llama_semcache_scope::llama_semcache_scope(const llama_model & model, llama_cparams & cparams, const llama_context_params & params) :
    model(model), cparams(cparams), config(semcache_take_pending()) {
    if (!config) {
        return;
    }
    const auto & p = config->params;
    const std::string why = obstacle(model, cparams, params);
    if (!why.empty()) {
        throw semcache_error(SEMCACHE_ERR_MODEL, "compressing the KV cache: expected " + why + "; use this model or mode without compression");
    }
    const int64_t n_ctx = GGML_PAD((int64_t) cparams.n_ctx, 256);
    if (p.n_stage > n_ctx) {
        throw semcache_error(SEMCACHE_ERR_ARGUMENT, "n_stage: expected at most n_ctx = " + std::to_string(n_ctx) + ", got " +
                std::to_string(p.n_stage) + "; raise n_ctx or lower n_stage");
    }
    // what does not fit the stage beside its window (and, before the first pass, the sinks) could never be decoded
    const uint32_t n_room = p.n_stage - p.n_window - p.n_sink;
    if (n_room < cparams.n_batch) {
        LLAMA_LOG_INFO("%s: n_batch lowered from %u to %u, the room of the stage\n", __func__, cparams.n_batch, n_room);
    }
    cparams.n_batch       = std::min(cparams.n_batch,  n_room);
    cparams.n_ubatch      = std::min(cparams.n_ubatch, n_room);
    scope_active = this;
}

llama_semcache_scope::~llama_semcache_scope() {
    if (scope_active == this) {
        scope_active = nullptr;
    }
}

void llama_semcache_scope::finish() const {
    if (config && !attached) {
        throw semcache_error(SEMCACHE_ERR_MODEL, "compressing the KV cache: expected a model with full-attention layers, got " +
                model.arch_name() + " without; use it without compression");
    }
}

static bool takes_store(llama_swa_type swa_type, const void * other) {
    return scope_active && scope_active->config && !scope_active->attached && swa_type == LLAMA_SWA_TYPE_NONE && !other;
}

uint32_t semcache_n_cells(uint32_t kv_size, llama_swa_type swa_type, const void * other) {
    return takes_store(swa_type, other) ? (uint32_t) scope_active->config->params.n_stage : kv_size;
}

std::shared_ptr<llama_semcache> semcache_attach(llama_kv_cache & kv, llama_swa_type swa_type, const void * other, bool v_trans) {
    if (!takes_store(swa_type, other) || kv.get_layer_ids().empty()) {
        return nullptr;
    }
    auto store = std::make_shared<llama_semcache>(kv, *scope_active, v_trans);
    scope_active->attached = true;
    return store;
}

//
// llama_semcache: construction
//

llama_semcache::llama_semcache(llama_kv_cache & kv, const llama_semcache_scope & scope, bool v_trans) :
    arch(scope.model.arch_name()), kv(kv), v_trans(v_trans), params(scope.config->params), n_ctx(scope.cparams.n_ctx), n_batch(scope.cparams.n_batch),
    vote_every(params.calibrate ? 1 : semcache::asks_queries((semcache::method) params.method) ? semcache::VOTE_EVERY : 0), n_ring(params.calibrate ? params.n_stage : params.n_stage - params.n_window), n_voted(params.n_stage) {
    const auto & hparams = scope.model.hparams;
    const auto & config  = *scope.config;

    // heads and their budgets
    std::vector<std::pair<int32_t, int32_t>> heads;
    for (const auto & kl : kv.layers) {
        for (uint32_t ih = 0; ih < hparams.n_head_kv(kl.il); ++ih) {
            heads.emplace_back(kl.il, ih);
        }
    }
    const int32_t lo = params.n_sink + params.n_chunk;
    std::vector<int32_t> rows;
    if (config.profile.heads.empty()) {
        rows = semcache::equal_budgets(heads.size(), params.ratio, n_ctx, lo);
    } else {
        bool same = config.profile.heads.size() == heads.size();
        for (size_t i = 0; same && i < heads.size(); ++i) {
            same = config.profile.heads[i].il == heads[i].first && config.profile.heads[i].ih == heads[i].second;
        }
        if (!same) {
            throw semcache_error(SEMCACHE_ERR_PROFILE, "profile " + config.profile_path + ": expected " + std::to_string(heads.size()) +
                    " kv heads of this model's compressed layers, got " + std::to_string(config.profile.heads.size()) +
                    " of other layers or counts; calibrate this model");
        }
        rows = config.profile.budgets(params.ratio, n_ctx, lo);
    }
    if (rows.empty()) {
        throw semcache_error(SEMCACHE_ERR_ARGUMENT, "ratio: expected at least " + std::to_string((float) lo/n_ctx) + " at n_ctx = " +
                std::to_string(n_ctx) + " (sinks and one chunk per head), got " + std::to_string(params.ratio) + "; raise the ratio or n_ctx");
    }

    // types of the rows
    auto resolve = [&](int32_t & type, auto n_embd_head) {
        if (type == SEMCACHE_TYPE_AUTO) {
            const bool whole = std::all_of(kv.layers.begin(), kv.layers.end(), [&](const auto & kl) {
                return hparams.n_head_kv(kl.il) == 0 || n_embd_head(kl.il)%ggml_blck_size(GGML_TYPE_Q8_0) == 0;
            });
            type = whole ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
        }
    };
    resolve(params.type_k, [&](uint32_t il) { return hparams.n_embd_head_k(il); });
    resolve(params.type_v, [&](uint32_t il) { return hparams.n_embd_head_v(il); });

    // layers
    ropes.resize(1);
    layer_of.assign(hparams.n_layer_all, -1);
    size_t at = 0;
    for (const auto & kl : kv.layers) {
        if (hparams.n_head_kv(kl.il) == 0) {
            continue; // a layer without attention
        }
        layer l = {};
        l.il      = kl.il;
        l.n_head  = hparams.n_head(kl.il);
        l.k_stage = kl.k;
        l.v_stage = kl.v;
        l.shape   = {
            (int32_t) hparams.n_embd_head_k(kl.il), (int32_t) hparams.n_embd_head_v(kl.il), (int32_t) hparams.n_gqa(kl.il),
            /*.scale =*/ 0.0f, hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f,
        };
        for (const auto & [name, type, d] : { std::tuple("K", params.type_k, l.shape.n_embd_head_k), std::tuple("V", params.type_v, l.shape.n_embd_head_v) }) {
            if (d%ggml_blck_size((ggml_type) type) != 0) {
                throw semcache_error(SEMCACHE_ERR_MODEL, std::string("cores of ") + ggml_type_name((ggml_type) type) + ": expected heads of a multiple of " +
                        std::to_string(ggml_blck_size((ggml_type) type)) + " values, got " + std::to_string(d) + " for " + name + " in layer " +
                        std::to_string(kl.il) + "; use f16");
            }
        }
        l.row_count.assign(hparams.n_head_kv(kl.il), 0);
        l.row_first.assign(1, 0);
        for (size_t ih = 0; ih < l.row_count.size(); ++ih) {
            l.row_first.push_back(l.row_first.back() + rows[at++]);
        }
        l.meta.resize(l.row_first.back());
        l.votes.resize(l.row_count.size()*params.n_stage);
        full_bytes += ggml_row_size(GGML_TYPE_F16, hparams.n_embd_k_gqa(kl.il) + hparams.n_embd_v_gqa(kl.il))*(size_t) n_ctx;

        // ropes[0] turns nothing
        const semcache::rope r = rope_of_layer(scope.model, scope.cparams, kl.il);
        const auto same = std::find_if(ropes.begin(), ropes.end(), [&](const semcache::rope & o) {
            return o.neox == r.neox && o.inv_freq == r.inv_freq;
        });
        l.rope = (int32_t) (same - ropes.begin());
        if (same == ropes.end()) {
            ropes.push_back(r);
        }
        layer_of[kl.il] = (int32_t) layers.size();
        layers.push_back(std::move(l));
    }
    allocate(scope);
    for (const layer & l : layers) {
        l.publish();
    }

    const auto & vocab = scope.model.vocab;
    delimiter.resize(vocab.n_tokens());
    const size_t n_text = vocab.get_type() == LLAMA_VOCAB_TYPE_NONE ? 0 : delimiter.size(); // tokens that can be asked what they say
    for (size_t i = 0; i < n_text; ++i) {
        delimiter[i] = vocab.is_control(i) || semcache::is_delimiter(vocab.token_to_piece(i));
    }
    chunker.n_chunk = params.n_chunk;

    if (params.calibrate) {
        scope.cparams.cb_eval           = semcache_residual::observe;
        scope.cparams.cb_eval_user_data = &residual;
    }
}

void llama_semcache::allocate(const llama_semcache_scope & scope) {
    std::map<ggml_backend_buffer_type_t, ggml_context *> ctx_of;
    for (auto & l : layers) {
        ggml_backend_buffer_type_t buft = ggml_backend_cpu_buffer_type();
        if (scope.cparams.offload_kqv) {
            buft = ggml_backend_dev_buffer_type(scope.model.dev_layer(l.il));
        }
        ggml_context *& ctx = ctx_of[buft];
        if (!ctx) {
            ggml_init_params ip = { 5*layers.size()*ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true };
            ctx = ggml_init(ip);
            if (!ctx) {
                throw semcache_error(SEMCACHE_ERR_MEMORY, "compressed KV cache: expected room for its tensors, got none; free memory");
            }
            ctxs_bufs.emplace_back(ggml_context_ptr(ctx), nullptr);
        }
        const int64_t n_row = l.row_first.back();
        l.k    = ggml_new_tensor_2d(ctx, (ggml_type) params.type_k, l.shape.n_embd_head_k, n_row);
        l.v    = ggml_new_tensor_2d(ctx, (ggml_type) params.type_v, l.shape.n_embd_head_v, n_row);
        l.bias = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_row);
        l.rows = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, l.n_head_kv(), 2);
        // queries only vote: 8 bits are enough for that (docs/decisions.md)
        const int64_t n_embd_q = (int64_t) l.shape.n_embd_head_k*l.n_head;
        l.q    = ggml_new_tensor_2d(ctx, n_embd_q%semcache::Q_BLOCK == 0 ? GGML_TYPE_Q8_0 : GGML_TYPE_F16, n_embd_q, ring_end() + 1);
        ggml_format_name(l.k,    "core_k_l%d",    l.il);
        ggml_format_name(l.v,    "core_v_l%d",    l.il);
        ggml_format_name(l.bias, "core_bias_l%d", l.il);
        ggml_format_name(l.rows, "core_rows_l%d", l.il);
        ggml_format_name(l.q,    "ring_q_l%d",    l.il);
    }
    for (auto & [ctx, buf] : ctxs_bufs) {
        const auto buft = std::find_if(ctx_of.begin(), ctx_of.end(), [&, c = ctx.get()](const auto & e) { return e.second == c; })->first;
        buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        if (!buf) {
            throw semcache_error(SEMCACHE_ERR_MEMORY, "compressed KV cache: expected " +
                    std::to_string(ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft)/1024/1024) + " MiB in " +
                    ggml_backend_buft_name(buft) + ", got none; lower n_ctx or the ratio");
        }
        LLAMA_LOG_INFO("%s: %10s core buffer size = %8.2f MiB\n", __func__, ggml_backend_buffer_name(buf.get()),
                ggml_backend_buffer_get_size(buf.get())/1024.0/1024.0);
    }
}

void llama_semcache::layer::publish() const {
    ggml_backend_tensor_set(rows, row_first.data(), 0,                                row_count.size()*sizeof(int32_t));
    ggml_backend_tensor_set(rows, row_count.data(), row_count.size()*sizeof(int32_t), row_count.size()*sizeof(int32_t));
}

llama_semcache::layer * llama_semcache::find(uint32_t il) {
    return il < layer_of.size() && layer_of[il] >= 0 ? &layers[layer_of[il]] : nullptr;
}

//
// llama_semcache: the pass
//

// A layer's tensors in host memory: the tensors themselves where the backend allows, else copies in an arena that was made
// large enough beforehand.
class llama_semcache::host_layer {
public:
    using arena = std::array<std::vector<uint8_t>, 6>;

    static void reserve(arena & a, const layer & l) {
        size_t i = 0;
        for (const ggml_tensor * t : tensors(l)) {
            if (!ggml_backend_buffer_is_host(t->buffer)) {
                a[i].resize(std::max(a[i].size(), ggml_nbytes(t)));
            }
            ++i;
        }
    }

    host_layer(const layer & l, arena & a) {
        void * p[6];
        size_t i = 0;
        for (const ggml_tensor * t : tensors(l)) {
            p[i] = t->data;
            if (!ggml_backend_buffer_is_host(t->buffer)) {
                p[i] = a[i].data();
                ggml_backend_tensor_get(t, p[i], 0, ggml_nbytes(t));
            }
            ++i;
        }
        k_stage = (f16 *) p[0];
        v_stage = (f16 *) p[1];
        q       = p[2];
        k       = (uint8_t *) p[3];
        v       = (uint8_t *) p[4];
        bias    = (float *) p[5];
    }

    // Copies of cores go back; a tensor in host memory already holds what was written.
    void write_back(const layer & l) {
        put(l.k,    k);
        put(l.v,    v);
        put(l.bias, bias);
    }

    f16     * k_stage, * v_stage;
    uint8_t * k, * v; // of the cores' types
    void    * q;      // of the ring's type
    float   * bias;

private:
    static std::array<ggml_tensor *, 6> tensors(const layer & l) { return { l.k_stage, l.v_stage, l.q, l.k, l.v, l.bias }; }

    static void put(ggml_tensor * t, const void * p) {
        if (p != t->data) {
            ggml_backend_tensor_set(t, p, 0, ggml_nbytes(t));
        }
    }
};

// One head of one layer in a pass.
struct llama_semcache::job {
    layer                * l;
    int32_t                ih;
    semcache::head_rows    rows;
    semcache::stage_rows   stage;
    semcache::query_rows   queries;
    semcache::pass_result  result;
    int32_t                n_rows; // candidates, sinks and window
};

llama_semcache::stage_tokens llama_semcache::collect() const {
    const auto & cells = kv.v_cells[0];
    stage_tokens st;
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i)) {
            st.cell.push_back(i);
        }
    }
    std::sort(st.cell.begin(), st.cell.end(), [&](int32_t a, int32_t b) { return cells.pos_get(a) < cells.pos_get(b); });
    for (int32_t i : st.cell) {
        st.pos.push_back(cells.pos_get(i));
        st.tok.push_back(cells.ext_get(i).tok);
    }
    return st;
}

std::vector<bool> llama_semcache::delimiters_of(const stage_tokens & st, int32_t begin, int32_t end) const {
    std::vector<bool> res(end - begin);
    for (int32_t i = begin; i < end; ++i) {
        const int32_t tok = st.tok[i];
        res[i - begin] = tok >= 0 && (size_t) tok < delimiter.size() && delimiter[tok];
    }
    return res;
}

semcache::stage_rows llama_semcache::stage_of(const layer & l, int32_t ih, const host_layer & host, const stage_tokens & st, int32_t n_sink,
                                              int32_t n_window, const std::vector<int32_t> & chunk) const {
    const int64_t d_k = l.shape.n_embd_head_k, d_v = l.shape.n_embd_head_v, n_stage = params.n_stage;
    semcache::stage_rows s = {};
    s.k      = host.k_stage + ih*d_k;
    s.k_cell = l.k_stage->ne[0];
    s.v      = host.v_stage + ih*d_v*(v_trans ? n_stage : 1);
    s.v_cell = v_trans ? 1 : l.v_stage->ne[0];
    s.v_elem = v_trans ? n_stage : 1;
    s.cell   = st.cell.data();
    s.chunk  = chunk.data();
    s.n_sink   = n_sink;
    s.n_window = n_window;
    s.n_new    = (int32_t) st.cell.size() - n_sink - n_window;
    return s;
}

semcache::query_rows llama_semcache::queries_of(const layer & l, int32_t ih, const host_layer & host, const std::vector<int32_t> & row) const {
    semcache::query_rows q = {};
    const int64_t first = (int64_t) ih*l.shape.n_gqa*l.shape.n_embd_head_k;
    if (l.q->type == GGML_TYPE_Q8_0) {
        q.q8       = (const semcache::q8_block *) host.q;
        q.q8_row   = l.q->ne[0]/semcache::Q_BLOCK;
        q.q8_first = (int32_t) first;
    } else {
        q.q     = (const f16 *) host.q + first;
        q.q_row = l.q->ne[0];
    }
    q.row    = row.data();
    q.n      = (int32_t) row.size();
    q.n_full = vote_every && !params.calibrate ? (params.n_stage - params.n_window - params.n_sink)/vote_every : 0;
    return q;
}

// Layers that are worked on together: all of those in host memory, the others one by one, to copy one layer at a time.
std::vector<std::vector<uint32_t>> llama_semcache::groups() const {
    std::vector<std::vector<uint32_t>> res(1);
    for (uint32_t i = 0; i < layers.size(); ++i) {
        if (ggml_backend_buffer_is_host(layers[i].k->buffer)) {
            res[0].push_back(i);
        } else {
            res.push_back({ i });
        }
    }
    return res;
}

size_t llama_semcache::kv_heads() const {
    return std::accumulate(layers.begin(), layers.end(), (size_t) 0, [](size_t n, const layer & l) { return n + l.n_head_kv(); });
}

bool llama_semcache::has_room(const std::vector<llama_ubatch> & ubatches) {
    llama_pos first = std::numeric_limits<llama_pos>::max(), last = -1;
    for (const auto & ubatch : ubatches) {
        const auto [lo, hi] = std::minmax_element(ubatch.pos, ubatch.pos + ubatch.n_tokens);
        first = std::min(first, *lo);
        last  = std::max(last,  *hi);
    }
    if (!has_cores() && kv.v_cells[0].get_used() == 0) {
        n_asked = first; // a text may begin anywhere
    }
    return first >= n_asked && (int64_t) last - n_asked < n_ring;
}

bool llama_semcache::pass_possible() const {
    const int32_t n = (int32_t) kv.v_cells[0].get_used();
    return kv.v_cells[0].seq_pos_max(0) >= n_asked && (int32_t) chunk_start.size() + n < N_CHUNK_MAX;
}

void llama_semcache::pass(llama_context * lctx) {
    const int64_t t_start = ggml_time_us();
    ggml_backend_sched_synchronize(lctx->get_sched()); // the context's own would end the timing of the batch that waits

    const stage_tokens st = collect();
    const int32_t n_tokens = (int32_t) st.cell.size(), pos_end = st.pos.back() + 1;
    int32_t n_sink = has_cores() ? 0 : params.n_sink;
    int32_t n_stop = n_tokens - params.n_window; // tokens that leave the stage
    if (n_stop <= n_sink) {
        n_sink = n_stop = 0;
    }
    const int32_t n_window = n_tokens - n_stop;

    // who votes
    std::vector<int32_t> ring, voter, asked(n_tokens);
    std::vector<int64_t> delta;
    for (int32_t i = 0; i < n_tokens; ++i) {
        if (st.pos[i] < n_asked) {
            asked[i] = n_voted[st.cell[i]];
        } else if (is_voter(st.pos[i])) {
            ring.push_back((int32_t) ring_row(st.pos[i]));
            voter.push_back(i);
            // a row is asked when it has left the window; the methods of others ask from where the query is
            delta.push_back(params.method != SEMCACHE_METHOD_SEMANTIC ? 0 :
                (int64_t) pos_end + params.n_window + semcache::look_ahead(params.seed, st.pos[i], params.n_horizon) - st.pos[i]);
        }
    }
    std::vector<std::vector<float>> turns(ropes.size());
    for (size_t r = 0; r < ropes.size(); ++r) {
        ropes[r].table(delta, turns[r]);
    }

    semcache::chunker next = chunker;
    std::vector<int32_t> chunk, starts = chunk_start;
    if (n_stop > 0) {
        next.run(delimiters_of(st, n_sink, n_stop), chunk);
        for (int32_t i = n_sink; i < n_stop; ++i) {
            if (i == n_sink || chunk[i - n_sink] != chunk[i - n_sink - 1]) {
                starts.push_back(st.pos[i]);
            }
        }
    }

    semcache::pass_params pp;
    pp.how   = (semcache::method) params.method;
    pp.merge = params.merge != 0;

    const int32_t n_threads = std::clamp(lctx->get_cparams().n_threads_batch, 1, (int32_t) kv_heads());
    int64_t n_merged = 0, n_dropped = 0;
    std::vector<semcache::pass_workspace> ws(n_threads);

    // everything that can fail comes before the first row is written
    host_layer::arena       arena;
    std::vector<host_layer> host;
    std::vector<job>        jobs;
    host.reserve(layers.size());
    jobs.reserve(kv_heads());
    for (const layer & l : layers) {
        host_layer::reserve(arena, l);
    }
    const auto all_groups = groups();
    for (const auto & group : all_groups) {
        std::vector<std::pair<int32_t, const layer *>> sizes; // of the jobs, as they are sorted below
        for (uint32_t i : group) {
            for (int32_t n : layers[i].row_count) {
                sizes.emplace_back(n + n_tokens, &layers[i]);
            }
        }
        std::stable_sort(sizes.begin(), sizes.end(), [](const auto & a, const auto & b) { return a.first > b.first; });
        for (size_t ith = 0; ith < ws.size(); ++ith) {
            for (size_t i = ith; i < sizes.size(); ++i) {
                ws[ith].reserve(sizes[i].second->shape, sizes[i].first, n_stop, (int32_t) ring.size());
            }
        }
    }

    for (const auto & group : all_groups) {
        host.clear();
        jobs.clear();
        for (uint32_t i : group) {
            layer & l = layers[i];
            host.emplace_back(l, arena);
            for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
                job j = {};
                j.l     = &l;
                j.ih    = ih;
                j.stage = stage_of(l, ih, host.back(), st, n_sink, n_window, chunk);
                j.stage.votes   = l.votes.data() + (size_t) ih*params.n_stage;
                j.stage.n_voted = asked.data();
                j.queries       = queries_of(l, ih, host.back(), ring);
                j.queries.cs    = turns[l.rope].data();
                j.queries.token = voter.data();
                const int64_t first = l.row_first[ih];
                j.rows = {
                    host.back().k + first*l.k->nb[1], host.back().v + first*l.v->nb[1],
                    host.back().bias + first, l.meta.data() + first, l.row_first[ih + 1] - l.row_first[ih],
                    has_cores() ? params.n_sink : 0, l.row_count[ih], row_type_of(params.type_k), row_type_of(params.type_v),
                };
                j.n_rows = l.row_count[ih] + n_tokens;
                jobs.push_back(j);
            }
        }
        std::stable_sort(jobs.begin(), jobs.end(), [](const job & a, const job & b) { return a.n_rows > b.n_rows; });
        run_jobs(jobs.size(), n_threads, [&](size_t i, int32_t ith) {
            job & j = jobs[i];
            j.result = semcache::compress_head(j.rows, j.stage, j.queries, j.l->shape, ropes[j.l->rope], pp, ws[ith]);
        });
        for (const job & j : jobs) {
            j.l->row_count[j.ih] = j.rows.n_used;
            n_merged  += j.result.n_merged;
            n_dropped += j.result.n_dropped;
        }
        for (size_t i = 0; i < group.size(); ++i) {
            host[i].write_back(layers[group[i]]);
            layers[group[i]].publish();
        }
    }

    auto & cells = kv.v_cells[0];
    for (int32_t i = 0; i < n_stop; ++i) {
        cells.rm(st.cell[i]);
    }
    for (int32_t i = n_stop; i < n_tokens; ++i) {
        n_voted[st.cell[i]] = asked[i] + (int32_t) ring.size();
    }
    if (n_stop > 0) {
        kv.v_heads[0] = 0;
        n_past        = st.pos[n_stop - 1] + 1;
    }
    n_asked       = pos_end;
    chunker       = next;
    chunk_start   = std::move(starts);
    rows_merged  += n_merged;
    rows_dropped += n_dropped;
    ++n_pass;
    pass_last_us = ggml_time_us() - t_start;
    pass_us     += pass_last_us;
}

namespace {

class semcache_pass_context : public llama_memory_context_i {
public:
    semcache_pass_context(llama_semcache & store, llama_context * lctx) : store(store), lctx(lctx) {}

    bool next() override { return false; }

    bool apply() override {
        try {
            store.pass(lctx);
            return true;
        } catch (const std::bad_alloc &) {
            semcache_set_error(SEMCACHE_ERR_MEMORY, "pass: expected memory for its scratch, got none; the cache is as it was: free memory or lower n_stage");
        } catch (const std::exception & err) {
            semcache_set_error(SEMCACHE_ERR_STATE, err.what());
        }
        LLAMA_LOG_ERROR("%s: %s\n", __func__, semcache_last_error());
        return false;
    }

    llama_memory_status get_status() const override {
        return store.pass_possible() ? LLAMA_MEMORY_STATUS_SUCCESS : LLAMA_MEMORY_STATUS_NO_UPDATE;
    }

    const llama_ubatch & get_ubatch() const override { GGML_ABORT("a pass has no batch"); }

private:
    llama_semcache & store;
    llama_context  * lctx;
};

} // namespace

llama_memory_context_ptr llama_semcache::init_pass(llama_context * lctx) {
    return std::make_unique<semcache_pass_context>(*this, lctx);
}

//
// llama_semcache: sequence operations
//

void llama_semcache::clear() {
    for (auto & l : layers) {
        std::fill(l.row_count.begin(), l.row_count.end(), 0);
        l.publish();
    }
    n_past          = 0;
    n_asked         = 0;
    chunker.next_id = 0;
    chunk_start.clear();
    rows_merged  = 0;
    rows_dropped = 0;
    residual.clear();
}

llama_pos llama_semcache::floor(llama_pos pos) const {
    if (pos >= n_past) {
        return pos;
    }
    const auto it = std::upper_bound(chunk_start.begin(), chunk_start.end(), pos);
    // the first chunk begins behind the sinks: cutting there would leave sinks alone, which is no gain over starting anew
    return it - chunk_start.begin() <= 1 ? 0 : *(it - 1);
}

bool llama_semcache::can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const llama_pos pos_max = std::max(n_past - 1, kv.v_cells[0].seq_pos_max(0));
    if (seq_id > 0 || p0 > pos_max || !has_cores()) {
        return true;
    }
    const bool to_end = p1 < 0 || p1 > pos_max;
    return p0 <= 0 ? to_end : p0 >= n_past || (to_end && floor(p0) == p0);
}

void llama_semcache::rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id > 0) {
        return;
    }
    if (p1 > kv.v_cells[0].seq_pos_max(0)) { // what comes behind the last token that stays votes anew
        const auto & tokens = kv.v_cells[0].seq_pos_get(0);
        const auto gone = tokens.lower_bound({ std::max(p0, 0), 0 });
        const llama_pos stays = gone == tokens.begin() ? 0 : std::prev(gone)->first + 1;
        n_asked = std::min(n_asked, std::max(stays, std::min(n_past, std::max(p0, 0))));
    }
    if (!has_cores() || p0 >= n_past) {
        return;
    }
    if (p0 <= 0) {
        clear();
        return;
    }
    const int32_t id = (int32_t) (std::lower_bound(chunk_start.begin(), chunk_start.end(), p0) - chunk_start.begin());
    for (auto & l : layers) {
        for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
            const auto * meta = l.meta.data() + l.row_first[ih];
            int32_t & n = l.row_count[ih];
            while (n > params.n_sink && (int32_t) meta[n - 1].chunk >= id) {
                --n;
            }
        }
        l.publish();
    }
    chunk_start.resize(id);
    chunker.next_id = id;
    n_past          = p0;
}

bool llama_semcache::window_is_held(const llama_kv_cache_iswa & kv, llama_pos pos) {
    const llama_kv_cache & swa = *kv.get_swa();
    return swa.seq_pos_min(0) <= std::max(kv.get_base()->seq_pos_min(0), pos - (llama_pos) swa.n_swa + 1);
}

bool llama_semcache::can_rm(const llama_kv_cache_iswa & kv, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const llama_kv_cache & swa = *kv.get_swa();
    const auto & store = kv.get_base()->semcache;
    if (!store || p0 > swa.seq_pos_max(0)) {
        return true;
    }
    return store->can_rm(seq_id, p0, p1) && (p0 <= 0 || window_is_held(kv, p0));
}

llama_pos llama_semcache::floor(const llama_memory_i & memory, llama_pos pos) const {
    if (const auto * iswa = dynamic_cast<const llama_kv_cache_iswa *>(&memory)) {
        return floor(*iswa, pos);
    }
    if (dynamic_cast<const llama_kv_cache *>(&memory)) {
        return floor(pos);
    }
    return pos > memory.seq_pos_max(0) ? pos : 0; // a recurrent state cannot be cut
}

llama_pos llama_semcache::floor(const llama_kv_cache_iswa & kv, llama_pos pos) {
    const llama_kv_cache & swa = *kv.get_swa();
    const llama_pos res = kv.get_base()->semcache->floor(pos);
    return res > swa.seq_pos_max(0) || window_is_held(kv, res) ? res : 0;
}

bool llama_semcache::refuse(const char * what) const {
    const std::string message = std::string(what) + ": expected an uncompressed KV cache, got a compressed one, whose only sequence stays where it is; clear it instead";
    semcache_set_error(SEMCACHE_ERR_STATE, message);
    LLAMA_LOG_ERROR("%s: %s\n", __func__, message.c_str());
    return true;
}

//
// llama_semcache: state
//

static void check_state_call(llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) { // llama.cpp takes the blocks of quantized rows for values
        throw semcache_error(SEMCACHE_ERR_STATE, "state: expected one in host memory, got LLAMA_STATE_SEQ_FLAGS_ON_DEVICE; leave the flag out");
    }
    if (seq_id > 0) {
        throw semcache_error(SEMCACHE_ERR_STATE, "state: expected sequence 0, the only one, got " + std::to_string(seq_id) + "; pass 0");
    }
}

std::vector<std::pair<const char *, uint32_t>> llama_semcache::state_head() const {
    return {
        { "magic",   STATE_MAGIC },                    { "version", STATE_VERSION },                   { "method",   (uint32_t) params.method },
        { "n_ctx",   (uint32_t) n_ctx },               { "n_stage", (uint32_t) params.n_stage },       { "n_window", (uint32_t) params.n_window },
        { "n_sink",  (uint32_t) params.n_sink },       { "n_chunk", (uint32_t) params.n_chunk },       { "n_layer",  (uint32_t) layers.size() },
        { "type_k",  (uint32_t) params.type_k },       { "type_v",  (uint32_t) params.type_v },        { "calibrate", params.calibrate != 0 },
    };
}

void llama_semcache::state_write_head(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    check_state_call(seq_id, flags);
    for (const auto & [name, value] : state_head()) {
        io.write(&value, sizeof(value));
    }
    for (const auto & l : layers) {
        write_vector(io, l.row_first);
    }
}

void llama_semcache::state_read_head(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    check_state_call(seq_id, flags);
    for (const auto & [name, want] : state_head()) {
        uint32_t got;
        io.read(&got, sizeof(got));
        if (got != want) {
            throw semcache_error(SEMCACHE_ERR_STATE, std::string("state: expected ") + name + " " + std::to_string(want) + ", got " +
                    std::to_string(got) + "; load it into a context with the settings it was saved with");
        }
    }
    for (const auto & l : layers) {
        std::vector<int32_t> first;
        read_vector(io, first, l.row_first.size());
        if (first != l.row_first) {
            throw semcache_error(SEMCACHE_ERR_STATE, "state: expected the same rows per head, got others in layer " + std::to_string(l.il) +
                    "; use the same kv_ratio and profile");
        }
    }
}

void llama_semcache::state_write_data(llama_io_write_i & io) const {
    io.write(&n_past,          sizeof(n_past));
    io.write(&n_asked,         sizeof(n_asked));
    io.write(&chunker.next_id, sizeof(chunker.next_id));
    write_vector(io, chunk_start);
    const int64_t counts[] = { rows_merged, rows_dropped };
    io.write(counts, sizeof(counts));

    const stage_tokens st = collect();
    write_vector(io, st.pos);
    write_vector(io, st.tok);
    for (int32_t cell : st.cell) {
        io.write(&n_voted[cell], sizeof(n_voted[cell]));
    }

    for (const auto & l : layers) {
        io.write(l.row_count.data(), l.row_count.size()*sizeof(int32_t));
        for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
            const size_t first = l.row_first[ih], n = l.row_count[ih];
            if (n > 0) {
                for (ggml_tensor * t : { l.k, l.v, l.bias }) {
                    const size_t row = t == l.bias ? sizeof(float) : t->nb[1];
                    io.write_tensor(t, first*row, n*row);
                }
                io.write(l.meta.data() + first, n*sizeof(l.meta[0]));
            }
        }
        for (size_t i = 0; i < st.cell.size(); ++i) {
            if (st.pos[i] >= n_asked) {
                if (is_voter(st.pos[i])) {
                    io.write_tensor(l.q, ring_row(st.pos[i])*l.q->nb[1], l.q->nb[1]);
                }
                continue;
            }
            for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
                io.write(&l.votes[(size_t) ih*params.n_stage + st.cell[i]], sizeof(l.votes[0]));
            }
        }
    }
}

void llama_semcache::state_read_data(llama_io_read_i & io) {
    clear();
    try {
        int32_t n_past_new, n_asked_new, next_id;
        std::vector<int32_t> starts, pos, tok;
        int64_t counts[2];
        io.read(&n_past_new,  sizeof(n_past_new));
        io.read(&n_asked_new, sizeof(n_asked_new));
        io.read(&next_id,     sizeof(next_id));
        read_vector(io, starts, N_CHUNK_MAX);
        io.read(counts, sizeof(counts));
        read_vector(io, pos, params.n_stage);
        read_vector(io, tok, params.n_stage);

        const stage_tokens st = collect(); // restored by the cache itself just before
        const bool fits = pos == st.pos && tok.size() == pos.size() && n_past_new >= 0 && (pos.empty() || pos[0] >= n_past_new) &&
            n_asked_new >= n_past_new && n_asked_new <= (pos.empty() ? n_past_new : pos.back() + 1) && (pos.empty() || pos.back() < n_asked_new + n_ring) &&
            (size_t) next_id == starts.size() && std::is_sorted(starts.begin(), starts.end()) && (starts.empty() || starts.back() < n_past_new);
        if (!fits) {
            throw semcache_error(SEMCACHE_ERR_IO, "state: expected the tokens of the stage and their chunks, got others; the file is damaged");
        }
        n_asked = n_asked_new; // tells the rows of the ring
        for (int32_t cell : st.cell) {
            io.read(&n_voted[cell], sizeof(n_voted[cell]));
            if (n_voted[cell] < 0) {
                throw semcache_error(SEMCACHE_ERR_IO, "state: expected at least 0 votes on a token, got " + std::to_string(n_voted[cell]) + "; the file is damaged");
            }
        }
        for (auto & l : layers) {
            std::vector<int32_t> count(l.row_count.size());
            io.read(count.data(), count.size()*sizeof(int32_t));
            for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
                const size_t first = l.row_first[ih], n = count[ih];
                const int32_t least = n_past_new > 0 ? params.n_sink : 0, most = n_past_new > 0 ? l.row_first[ih + 1] - l.row_first[ih] : 0;
                if (count[ih] < least || count[ih] > most) {
                    throw semcache_error(SEMCACHE_ERR_IO, "state: expected " + std::to_string(least) + " to " + std::to_string(most) +
                            " rows per head, got " + std::to_string(count[ih]) + "; the file is damaged");
                }
                if (n > 0) {
                    for (ggml_tensor * t : { l.k, l.v, l.bias }) {
                        const size_t row = t == l.bias ? sizeof(float) : t->nb[1];
                        io.read_tensor(t, first*row, n*row);
                    }
                    io.read(l.meta.data() + first, n*sizeof(l.meta[0]));
                    for (size_t i = first + params.n_sink; i < first + n; ++i) {
                        if ((int32_t) l.meta[i].chunk >= next_id || (i > first + params.n_sink && l.meta[i].chunk < l.meta[i - 1].chunk)) {
                            throw semcache_error(SEMCACHE_ERR_IO, "state: expected rows in the order of their chunks, got others; the file is damaged");
                        }
                    }
                }
            }
            l.row_count = count;
            l.publish();
            for (size_t i = 0; i < st.cell.size(); ++i) {
                if (st.pos[i] >= n_asked) {
                    if (is_voter(st.pos[i])) {
                        io.read_tensor(l.q, ring_row(st.pos[i])*l.q->nb[1], l.q->nb[1]);
                    }
                    continue;
                }
                for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
                    io.read(&l.votes[(size_t) ih*params.n_stage + st.cell[i]], sizeof(l.votes[0]));
                }
            }
        }
        auto & cells = kv.v_cells[0];
        for (size_t i = 0; i < st.cell.size(); ++i) {
            llama_kv_cell_ext ext = cells.ext_get(st.cell[i]);
            ext.tok = tok[i];
            cells.ext_set(st.cell[i], ext);
        }
        n_past          = n_past_new;
        chunker.next_id = next_id;
        chunk_start     = std::move(starts);
        rows_merged     = counts[0];
        rows_dropped    = counts[1];
    } catch (...) {
        kv.clear(true);
        throw;
    }
}

//
// llama_semcache: numbers
//

void llama_semcache::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const {
    for (const auto & [ctx, buf] : ctxs_bufs) {
        sizes[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
    }
}

void llama_semcache::stats(semcache_stats & s) const {
    s = {};
    s.method   = params.method;
    s.n_layer  = (int32_t) layers.size();
    s.n_ctx    = n_ctx;
    s.n_stage  = params.n_stage;
    s.n_window = params.n_window;
    s.n_batch  = n_batch;
    s.n_tokens_stage = kv.v_cells[0].get_used();
    s.n_tokens       = std::max(n_past - 1, kv.v_cells[0].seq_pos_max(0)) + 1;
    for (const auto & l : layers) {
        s.n_head_kv      += l.n_head_kv();
        s.rows_allocated += l.row_first.back();
        s.rows_used      += std::accumulate(l.row_count.begin(), l.row_count.end(), (int64_t) 0);
        s.core_bytes     += allocated(l.k) + allocated(l.v) + allocated(l.bias) + allocated(l.rows);
        s.stage_bytes    += ggml_nbytes(l.k_stage) + ggml_nbytes(l.v_stage);
        s.query_bytes    += allocated(l.q);
        s.meta_bytes     += l.meta.size()*sizeof(l.meta[0]) + l.votes.size()*sizeof(l.votes[0]);
    }
    s.rows_merged  = rows_merged;
    s.rows_dropped = rows_dropped;
    s.n_pass       = n_pass;
    s.pass_us      = pass_us;
    s.pass_last_us = pass_last_us;
    s.full_bytes   = full_bytes;
}

int32_t llama_semcache::head_stats(semcache_head_stats * heads, int32_t n) const {
    int32_t i = 0;
    for (const auto & l : layers) {
        for (int32_t ih = 0; ih < l.n_head_kv(); ++ih, ++i) {
            if (i < n) {
                heads[i] = { (int32_t) l.il, ih, l.row_first[ih + 1] - l.row_first[ih], l.row_count[ih], 2*(int32_t) ropes[l.rope].inv_freq.size() };
            }
        }
    }
    return i;
}

void llama_semcache::calibrate_add(llama_context * lctx) {
    // probes lie behind the window, and one pass at least comes before it
    const int32_t n_probe = 256, n_tokens = (int32_t) kv.v_cells[0].get_used();
    const int32_t n_stop  = n_tokens - params.n_window - n_probe;
    if (!params.calibrate || has_cores() || n_stop <= params.n_sink) {
        throw semcache_error(SEMCACHE_ERR_STATE, "calibration: expected one text of more than " +
                std::to_string(params.n_sink + params.n_window + n_probe) + " tokens that lies wholly in the stage, in a context made with calibrate = 1, got " +
                std::to_string(n_tokens) + " tokens" + (has_cores() ? " after a pass" : "") + (params.calibrate ? "" : " and calibrate = 0") +
                "; clear the cache and use a stage as large as the text");
    }
    lctx->synchronize();
    const stage_tokens st = collect();
    std::vector<int32_t> chunk, ring;
    for (int32_t pos : st.pos) {
        ring.push_back((int32_t) ring_row(pos));
    }
    semcache::chunker cut = chunker;
    cut.run(delimiters_of(st, params.n_sink, n_stop), chunk);

    semcache::calibrate_params cp;
    cp.pass.merge = params.merge != 0;
    cp.n_window   = params.n_window;
    cp.n_horizon  = params.n_horizon;
    cp.seed       = params.seed;

    const int32_t n_threads = std::max(1, lctx->get_cparams().n_threads_batch);
    std::vector<semcache::pass_workspace> ws(n_threads);
    std::vector<std::pair<int32_t, int32_t>> heads;
    std::vector<std::vector<double>> errors;
    host_layer::arena arena;
    for (const layer & l : layers) {
        host_layer::reserve(arena, l);
    }
    for (const auto & group : groups()) {
        std::vector<host_layer> host;
        std::vector<job>        jobs;
        host.reserve(group.size());
        for (uint32_t i : group) {
            layer & l = layers[i];
            host.emplace_back(l, arena);
            for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
                job j = {};
                j.l     = &l;
                j.ih    = ih;
                j.stage   = stage_of(l, ih, host.back(), st, params.n_sink, params.n_window + n_probe, chunk);
                j.queries = queries_of(l, ih, host.back(), ring);
                jobs.push_back(j);
                heads.emplace_back(l.il, ih);
            }
        }
        const size_t at = errors.size();
        errors.resize(at + jobs.size());
        run_jobs(jobs.size(), n_threads, [&](size_t i, int32_t ith) {
            const job & j = jobs[i];
            errors[at + i] = semcache::output_errors({ j.stage, j.queries, st.pos.data(), n_probe }, j.l->shape, ropes[j.l->rope], cp, semcache::profile_parts(), ws[ith]);
        });
    }
    for (size_t h = 0; h < heads.size(); ++h) {
        const double size = residual.size(heads[h].first);
        for (double & x : errors[h]) {
            x /= size;
            if (!std::isfinite(x)) {
                throw semcache_error(SEMCACHE_ERR_STATE, "calibration: expected finite attention and a residual stream, got others in layer " +
                        std::to_string(heads[h].first) + "; the model file is damaged or of an unknown kind");
            }
        }
    }
    measured.add(heads, errors);
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
