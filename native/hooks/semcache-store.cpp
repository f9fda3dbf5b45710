// semcache-store.cpp - the rows: how they are allocated, cut and counted

#include "semcache-store.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

namespace {

// Angles per position of a layer's RoPE, as ggml_rope_ext turns them (ggml-cpu/ops.cpp, rope_yarn): linear in the
// position.
semcache::rope rope_of_layer(const llama_model & model, const llama_cparams & cparams, uint32_t il) {
    const auto & hparams = model.hparams;
    semcache::rope r;
    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE || !hparams.has_rope(il)) {
        return r;
    }
    const int32_t n_rot = (int32_t) hparams.n_rot(il);
    const float freq_base = model.get_rope_freq_base(cparams, il);
    const float freq_scale = model.get_rope_freq_scale(cparams, il);

    r.neox = hparams.rope_type == LLAMA_ROPE_TYPE_NEOX;
    r.inv_freq.resize(n_rot / 2);

    std::vector<float> factors(n_rot / 2, 1.0f);
    if (const ggml_tensor * t = model.get_rope_factors(cparams, il)) {
        ggml_backend_tensor_get(t, factors.data(), 0, factors.size() * sizeof(float));
    }

    float corr[2] = { 0.0f, 0.0f };
    ggml_rope_yarn_corr_dims(
        n_rot, cparams.n_ctx_orig_yarn, freq_base, cparams.yarn_beta_fast, cparams.yarn_beta_slow, corr);
    for (int32_t i = 0; i < n_rot / 2; ++i) {
        const double extrap = std::pow((double) freq_base, -2.0 * i / n_rot) / factors[i];
        const double y = ((double) i - corr[0]) / std::max(0.001f, corr[1] - corr[0]);
        const double mix = (1.0 - std::clamp(y, 0.0, 1.0)) * cparams.yarn_ext_factor;
        r.inv_freq[i] = (float) (freq_scale * extrap * (1.0 - mix) + extrap * mix);
    }
    return r;
}

// Bytes of a tensor in its buffer.
size_t allocated(const ggml_tensor * t) {
    const auto buft = ggml_backend_buffer_get_type(t->buffer);
    return GGML_PAD(ggml_backend_buft_get_alloc_size(buft, t), ggml_backend_buft_get_alignment(buft));
}

} // namespace

//
// construction
//

llama_semcache::llama_semcache(llama_kv_cache & kv, const llama_semcache_scope & scope, bool v_trans) :
    arch(scope.model.arch_name()), kv(kv), v_trans(v_trans), params(scope.config->params), n_ctx(scope.cparams.n_ctx),
    n_batch(scope.cparams.n_batch),
    vote_every(params.calibrate                                           ? 1
               : semcache::asks_queries((semcache::method) params.method) ? semcache::VOTE_EVERY
                                                                          : 0),
    n_ring(params.calibrate ? params.n_stage : params.n_stage - params.n_window), n_voted(params.n_stage) {
    const auto & hparams = scope.model.hparams;
    const auto & config = *scope.config;

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
            throw semcache_error(SEMCACHE_ERR_PROFILE,
                "profile " + config.profile_path + ": expected " + std::to_string(heads.size()) +
                    " kv heads of this model's compressed layers, got " + std::to_string(config.profile.heads.size()) +
                    " of other layers or counts; calibrate this model");
        }
        rows = config.profile.budgets(params.ratio, n_ctx, lo);
    }
    if (rows.empty()) {
        throw semcache_error(SEMCACHE_ERR_ARGUMENT,
            "ratio: expected at least " + std::to_string((float) lo / n_ctx) + " at n_ctx = " + std::to_string(n_ctx) +
                " (sinks and one chunk per head), got " + std::to_string(params.ratio) + "; raise the ratio or n_ctx");
    }

    // types of the rows
    auto resolve = [&](int32_t & type, auto n_embd_head) {
        if (type == SEMCACHE_TYPE_AUTO) {
            const bool whole = std::all_of(kv.layers.begin(), kv.layers.end(), [&](const auto & kl) {
                return hparams.n_head_kv(kl.il) == 0 || n_embd_head(kl.il) % ggml_blck_size(GGML_TYPE_Q8_0) == 0;
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
        l.il = kl.il;
        l.n_head = hparams.n_head(kl.il);
        l.k_stage = kl.k;
        l.v_stage = kl.v;
        l.shape = {
            (int32_t) hparams.n_embd_head_k(kl.il),
            (int32_t) hparams.n_embd_head_v(kl.il),
            (int32_t) hparams.n_gqa(kl.il),
            /*.scale =*/0.0f,
            hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f,
        };
        for (const auto & [name, type, d] : { std::tuple("K", params.type_k, l.shape.n_embd_head_k),
                 std::tuple("V", params.type_v, l.shape.n_embd_head_v) }) {
            if (d % ggml_blck_size((ggml_type) type) != 0) {
                throw semcache_error(SEMCACHE_ERR_MODEL,
                    std::string("cores of ") + ggml_type_name((ggml_type) type) + ": expected heads of a multiple of " +
                        std::to_string(ggml_blck_size((ggml_type) type)) + " values, got " + std::to_string(d) +
                        " for " + name + " in layer " + std::to_string(kl.il) + "; use f16");
            }
        }
        l.row_count.assign(hparams.n_head_kv(kl.il), 0);
        l.row_first.assign(1, 0);
        for (size_t ih = 0; ih < l.row_count.size(); ++ih) {
            l.row_first.push_back(l.row_first.back() + rows[at++]);
        }
        l.meta.resize(l.row_first.back());
        l.votes.resize(l.row_count.size() * params.n_stage);
        full_bytes +=
            ggml_row_size(GGML_TYPE_F16, hparams.n_embd_k_gqa(kl.il) + hparams.n_embd_v_gqa(kl.il)) * (size_t) n_ctx;

        // ropes[0] turns nothing
        const semcache::rope r = rope_of_layer(scope.model, scope.cparams, kl.il);
        const auto same = std::find_if(ropes.begin(), ropes.end(),
            [&](const semcache::rope & o) { return o.neox == r.neox && o.inv_freq == r.inv_freq; });
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
    const size_t n_text =
        vocab.get_type() == LLAMA_VOCAB_TYPE_NONE ? 0 : delimiter.size(); // tokens that can be asked what they say
    for (size_t i = 0; i < n_text; ++i) {
        delimiter[i] = vocab.is_control(i) || semcache::is_delimiter(vocab.token_to_piece(i));
    }
    chunker.n_chunk = params.n_chunk;

    if (params.calibrate) {
        scope.cparams.cb_eval = semcache_residual::observe;
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
            ggml_init_params ip = { 5 * layers.size() * ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true };
            ctx = ggml_init(ip);
            if (!ctx) {
                throw semcache_error(
                    SEMCACHE_ERR_MEMORY, "compressed KV cache: expected room for its tensors, got none; free memory");
            }
            ctxs_bufs.emplace_back(ggml_context_ptr(ctx), nullptr);
        }
        const int64_t n_row = l.row_first.back();
        l.k = ggml_new_tensor_2d(ctx, (ggml_type) params.type_k, l.shape.n_embd_head_k, n_row);
        l.v = ggml_new_tensor_2d(ctx, (ggml_type) params.type_v, l.shape.n_embd_head_v, n_row);
        l.bias = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_row);
        l.rows = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, l.n_head_kv(), 2);
        // queries only vote: 8 bits are enough for that (docs/decisions.md)
        const int64_t n_embd_q = (int64_t) l.shape.n_embd_head_k * l.n_head;
        l.q = ggml_new_tensor_2d(
            ctx, n_embd_q % semcache::Q_BLOCK == 0 ? GGML_TYPE_Q8_0 : GGML_TYPE_F16, n_embd_q, ring_end() + 1);
        ggml_format_name(l.k, "core_k_l%d", l.il);
        ggml_format_name(l.v, "core_v_l%d", l.il);
        ggml_format_name(l.bias, "core_bias_l%d", l.il);
        ggml_format_name(l.rows, "core_rows_l%d", l.il);
        ggml_format_name(l.q, "ring_q_l%d", l.il);
    }
    for (auto & [ctx, buf] : ctxs_bufs) {
        const auto buft = std::find_if(ctx_of.begin(), ctx_of.end(), [&, c = ctx.get()](const auto & e) {
            return e.second == c;
        })->first;
        buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        if (!buf) {
            throw semcache_error(SEMCACHE_ERR_MEMORY,
                "compressed KV cache: expected " +
                    std::to_string(ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) / 1024 / 1024) +
                    " MiB in " + ggml_backend_buft_name(buft) + ", got none; lower n_ctx or the ratio");
        }
        LLAMA_LOG_INFO("%s: %10s core buffer size = %8.2f MiB\n", __func__, ggml_backend_buffer_name(buf.get()),
            ggml_backend_buffer_get_size(buf.get()) / 1024.0 / 1024.0);
    }
}

void llama_semcache::layer::publish() const {
    ggml_backend_tensor_set(rows, row_first.data(), 0, row_count.size() * sizeof(int32_t));
    ggml_backend_tensor_set(
        rows, row_count.data(), row_count.size() * sizeof(int32_t), row_count.size() * sizeof(int32_t));
}

llama_semcache::layer * llama_semcache::find(uint32_t il) {
    return il < layer_of.size() && layer_of[il] >= 0 ? &layers[layer_of[il]] : nullptr;
}

//
// sequence operations
//

void llama_semcache::clear() {
    for (auto & l : layers) {
        std::fill(l.row_count.begin(), l.row_count.end(), 0);
        l.publish();
    }
    n_past = 0;
    n_asked = 0;
    chunker.next_id = 0;
    chunk_start.clear();
    rows_merged = 0;
    rows_dropped = 0;
    residual.clear();
}

llama_pos llama_semcache::floor(llama_pos pos) const {
    if (pos >= n_past) {
        return pos;
    }
    const auto it = std::upper_bound(chunk_start.begin(), chunk_start.end(), pos);
    // the first chunk begins behind the sinks: cutting there would leave sinks alone, which is no gain over starting
    // anew
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
    n_past = p0;
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

//
// numbers
//

void llama_semcache::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const {
    for (const auto & [ctx, buf] : ctxs_bufs) {
        sizes[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
    }
}

void llama_semcache::stats(semcache_stats & s) const {
    s = {};
    s.method = params.method;
    s.n_layer = (int32_t) layers.size();
    s.n_ctx = n_ctx;
    s.n_stage = params.n_stage;
    s.n_window = params.n_window;
    s.n_batch = n_batch;
    s.n_tokens_stage = kv.v_cells[0].get_used();
    s.n_tokens = std::max(n_past - 1, kv.v_cells[0].seq_pos_max(0)) + 1;
    for (const auto & l : layers) {
        s.n_head_kv += l.n_head_kv();
        s.rows_allocated += l.row_first.back();
        s.rows_used += std::accumulate(l.row_count.begin(), l.row_count.end(), (int64_t) 0);
        s.core_bytes += allocated(l.k) + allocated(l.v) + allocated(l.bias) + allocated(l.rows);
        s.stage_bytes += ggml_nbytes(l.k_stage) + ggml_nbytes(l.v_stage);
        s.query_bytes += allocated(l.q);
        s.meta_bytes += l.meta.size() * sizeof(l.meta[0]) + l.votes.size() * sizeof(l.votes[0]);
    }
    s.rows_merged = rows_merged;
    s.rows_dropped = rows_dropped;
    s.n_pass = n_pass;
    s.pass_us = pass_us;
    s.pass_last_us = pass_last_us;
    s.full_bytes = full_bytes;
}

int32_t llama_semcache::head_stats(semcache_head_stats * heads, int32_t n) const {
    int32_t i = 0;
    for (const auto & l : layers) {
        for (int32_t ih = 0; ih < l.n_head_kv(); ++ih, ++i) {
            if (i < n) {
                heads[i] = { (int32_t) l.il, ih, l.row_first[ih + 1] - l.row_first[ih], l.row_count[ih],
                    2 * (int32_t) ropes[l.rope].inv_freq.size() };
            }
        }
    }
    return i;
}
