#include "semcache-store.h"

#include "ggml-row-type.h"
#include "gpu/pass-dims.h"
#include "semcache-device.h"
#include "semcache-hooks.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace {

// Of the query ring: queries vote and are what rows are fitted to, for which 5 bits are enough; a calibration also
// measures with them (docs/decisions.md).
constexpr ggml_type TYPE_Q = GGML_TYPE_Q5_0, TYPE_Q_CALIBRATE = GGML_TYPE_Q8_0;

// Whether M-RoPE turns pair i of a token of text: its first three positions are the text's, the fourth is 0
// (llm_graph_input_pos::set_input; the sections are those of ggml-cpu/ops.cpp, ggml_mrope_cache_init).
bool turns_text(const llama_hparams & hparams, int32_t i) {
    const auto & s = hparams.rope_sections;
    const int32_t sector = i % (s[0] + s[1] + s[2] + s[3]);
    if (hparams.rope_type == LLAMA_ROPE_TYPE_IMROPE) {
        return sector < 3 * s[sector % 3];
    }
    return sector < s[0] + s[1] + s[2];
}

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

    const bool is_mrope = hparams.n_pos_per_embd() > 1; // which pairs values as NeoX does
    r.neox = hparams.rope_type == LLAMA_ROPE_TYPE_NEOX || is_mrope;
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
        if (is_mrope && !turns_text(hparams, i)) {
            r.inv_freq[i] = 0.0f;
        }
    }
    return r;
}

// Bytes of a tensor in its buffer.
size_t allocated(const ggml_tensor * t) {
    const auto buft = ggml_backend_buffer_get_type(t->buffer);
    return GGML_PAD(ggml_backend_buft_get_alloc_size(buft, t), ggml_backend_buft_get_alignment(buft));
}

// Rows of every head, all compressed layers one after the other.
std::vector<int32_t> budgets(
    const std::vector<std::pair<int32_t, int32_t>> & heads, const semcache_config & config, int32_t n_ctx) {
    const auto & p = config.params;
    const int32_t lo = p.n_sink + p.n_chunk;
    std::vector<int32_t> rows;
    if (config.profile.heads.empty()) {
        rows = semcache::equal_budgets(heads.size(), p.ratio, n_ctx, lo);
    } else {
        const auto & known = config.profile.heads;
        const bool same = std::equal(heads.begin(), heads.end(), known.begin(), known.end(),
            [](const auto & a, const auto & b) { return a.first == b.il && a.second == b.ih; });
        if (!same) {
            throw semcache_error(SEMCACHE_ERR_PROFILE,
                "profile " + config.profile_path + ": expected " + std::to_string(heads.size()) +
                    " kv heads of this model's compressed layers, got " + std::to_string(known.size()) +
                    " of other layers or counts; calibrate this model");
        }
        rows = config.profile.budgets(p.ratio, n_ctx, lo);
    }
    if (rows.empty()) {
        throw semcache_error(SEMCACHE_ERR_ARGUMENT,
            "ratio: expected at least " + std::to_string((float) lo / n_ctx) + " at n_ctx = " + std::to_string(n_ctx) +
                " (sinks and one chunk per head), got " + std::to_string(p.ratio) + "; raise the ratio or n_ctx");
    }
    return rows;
}

} // namespace

//
// construction
//

semcache_store::semcache_store(const std::vector<semcache_stage_layer> & stage, const llama_semcache_scope & scope,
    int64_t n_vote_row) : params(scope.config->params) {
    const auto & hparams = scope.model.hparams;
    std::vector<std::pair<int32_t, int32_t>> heads;
    for (const auto & sl : stage) {
        for (uint32_t ih = 0; ih < hparams.n_head_kv(sl.il); ++ih) {
            heads.emplace_back(sl.il, ih);
        }
    }
    make_layers(stage, scope, budgets(heads, *scope.config, (int32_t) scope.cparams.n_ctx));
    allocate(scope, n_vote_row);
    clear();
}

void semcache_store::make_layers(const std::vector<semcache_stage_layer> & stage, const llama_semcache_scope & scope,
    const std::vector<int32_t> & rows) {
    const auto & hparams = scope.model.hparams;
    ropes.resize(1);
    size_t at = 0;
    for (const auto & sl : stage) {
        if (hparams.n_head_kv(sl.il) == 0) {
            continue; // a layer without attention
        }
        layer l = {};
        l.il = sl.il;
        l.readers = sl.readers;
        l.q_weight_of.resize(l.n_q_layer());
        l.n_head = hparams.n_head(sl.il);
        l.k_stage = sl.k;
        l.v_stage = sl.v;
        l.shape.n_embd_head_k = (int32_t) hparams.n_embd_head_k(sl.il);
        l.shape.n_embd_head_v = (int32_t) hparams.n_embd_head_v(sl.il);
        l.shape.n_gqa = (int32_t) hparams.n_gqa(sl.il);
        l.shape.softcap = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
        l.row_count.assign(hparams.n_head_kv(sl.il), 0);
        l.row_first.assign(1, 0);
        for (size_t ih = 0; ih < l.row_count.size(); ++ih) {
            l.row_first.push_back(l.row_first.back() + rows[at++]);
        }
        const int64_t n_embd = hparams.n_embd_k_gqa(sl.il) + hparams.n_embd_v_gqa(sl.il);
        full_bytes += ggml_row_size(GGML_TYPE_F16, n_embd) * (size_t) scope.cparams.n_ctx;

        const semcache::rope r = rope_of_layer(scope.model, scope.cparams, sl.il);
        const auto same = std::find_if(ropes.begin(), ropes.end(),
            [&](const semcache::rope & o) { return o.neox == r.neox && o.inv_freq == r.inv_freq; });
        l.rope = (int32_t) (same - ropes.begin());
        if (same == ropes.end()) {
            ropes.push_back(r);
        }
        layers.push_back(std::move(l));
    }
}

void semcache_store::make_tensors(ggml_context * ctx, layer & l, int64_t n_vote_row) const {
    const int64_t n_row = l.row_first.back(), n_stage = params.n_stage;
    const int64_t n_embd_q = (int64_t) l.shape.n_embd_head_k * l.n_head;
    const bool fills = l.shape.n_embd_head_k % 16 == 0 && n_embd_q % ggml_blck_size(TYPE_Q) == 0;
    const ggml_type type_q = fills ? (params.calibrate ? TYPE_Q_CALIBRATE : TYPE_Q) : GGML_TYPE_F16;
    auto make = [&](const char * name, ggml_type type, int64_t ne0, int64_t ne1) {
        ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
        ggml_format_name(t, "core_%s_l%d", name, l.il);
        return t;
    };
    l.k = make("k", (ggml_type) params.type_k, l.shape.n_embd_head_k, n_row);
    l.v = make("v", (ggml_type) params.type_v, l.shape.n_embd_head_v, n_row);
    l.bias = make("bias", GGML_TYPE_F16, n_row, 1);
    l.s_use =
        make("s_use", semcache::evicts((semcache::method) params.method) ? GGML_TYPE_F32 : GGML_TYPE_F16, n_row, 1);
    l.origin = make("origin", GGML_TYPE_I32, n_row, 1);
    l.heads = make("heads", GGML_TYPE_F16,
        semcache::head_size(l.shape.n_embd_head_k, l.shape.n_embd_head_v, params.n_sink), l.n_head_kv());
    l.rows = make("rows", GGML_TYPE_I32, l.n_head_kv(), 2);
    l.vote_p4 = make("vote_p4", GGML_TYPE_F32, n_stage, l.n_head_kv());
    l.vote_p = make("vote_p", GGML_TYPE_F32, n_stage, l.n_head_kv());
    l.q = make("q", type_q, n_embd_q * l.n_q_layer(), n_vote_row);
}

void semcache_store::allocate(const llama_semcache_scope & scope, int64_t n_vote_row) {
    constexpr size_t N_TENSOR = 10; // of a layer
    std::map<ggml_backend_buffer_type_t, ggml_context *> ctx_of;
    for (auto & l : layers) {
        ggml_backend_buffer_type_t buft = ggml_backend_cpu_buffer_type();
        if (scope.cparams.offload_kqv) {
            buft = ggml_backend_dev_buffer_type(scope.model.dev_layer(l.il));
        }
        ggml_context *& ctx = ctx_of[buft];
        if (!ctx) {
            ctx = ggml_init({ N_TENSOR * layers.size() * ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true });
            if (!ctx) {
                throw semcache_error(
                    SEMCACHE_ERR_MEMORY, "compressed KV cache: expected room for its tensors, got none; free memory");
            }
            ctxs_bufs.emplace_back(ggml_context_ptr(ctx), nullptr);
        }
        make_tensors(ctx, l, n_vote_row);
    }
    for (auto & [ctx, buf] : ctxs_bufs) {
        const auto buft = std::find_if(ctx_of.begin(), ctx_of.end(), [&, c = ctx.get()](const auto & e) {
            return e.second == c;
        })->first;
        buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        if (!buf) {
            const size_t size = ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft);
            throw semcache_error(SEMCACHE_ERR_MEMORY,
                "compressed KV cache: expected " + std::to_string(size / 1024 / 1024) + " MiB in " +
                    ggml_backend_buft_name(buft) + ", got none; lower n_ctx or the ratio");
        }
        LLAMA_LOG_INFO("%s: %10s core buffer size = %8.2f MiB\n", __func__, ggml_backend_buffer_name(buf.get()),
            ggml_backend_buffer_get_size(buf.get()) / 1024.0 / 1024.0);
        ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
        if (!ggml_backend_buft_is_host(buft) && semcache_device_passes(dev, params, 0)) {
            allocate_work(buft, n_vote_row);
        }
    }
}

// Now, so that no pass can fail for want of it.
void semcache_store::allocate_work(ggml_backend_buffer_type_t buft, int64_t n_vote_row) {
    // see llama_semcache_scope: an ubatch is no larger than what leaves for it
    const int32_t n_stage = params.n_stage, n_leave = n_stage - params.n_window, n_voter = (int32_t) n_vote_row;
    int64_t n_head = 0, work = 0, size = semcache::device_plan_size(n_stage, n_voter);
    for (const semcache::rope & r : ropes) {
        size += semcache::device_table_size(n_stage, n_voter, 2 * (int32_t) r.inv_freq.size());
    }
    for (const layer & l : layers) {
        if (ggml_backend_buffer_get_type(l.k->buffer) != buft) {
            continue;
        }
        int32_t n_alloc = 0;
        for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
            n_alloc = std::max(n_alloc, l.n_alloc(ih));
        }
        n_head += l.n_head_kv();
        size += semcache::DEVICE_PARAMS_SIZE +
                semcache::device_size<float>((int64_t) l.n_q_layer() * l.shape.n_embd_head_k); // weights of queries
        work = std::max(work, semcache::device_work_size(args(l, false, false), n_alloc, n_stage, n_leave, n_voter));
    }
    size += work + semcache::device_size<int32_t>(4 * n_head);
    if (!semcache_device_passes(ggml_backend_buft_get_device(buft), params, size)) {
        LLAMA_LOG_WARN("%s: %s computes no passes in %.1f MiB: they are left to the CPU, over copies\n", __func__,
            ggml_backend_buft_name(buft), size / 1024.0 / 1024.0);
        return;
    }
    device_work & w = works[buft];
    w.ctx.reset(ggml_init({ ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }));
    if (w.ctx) {
        w.t = ggml_new_tensor_1d(w.ctx.get(), GGML_TYPE_I8, size);
        w.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(w.ctx.get(), buft));
    }
    if (!w.buf) {
        throw semcache_error(SEMCACHE_ERR_MEMORY,
            "compressed KV cache: expected " + std::to_string(size / 1024 / 1024) + " MiB in " +
                ggml_backend_buft_name(buft) + " for its passes to work in, got none; lower n_ctx or the ratio");
    }
}

ggml_tensor * semcache_store::work(const layer & l) const {
    const auto it = works.find(ggml_backend_buffer_get_type(l.k->buffer));
    return it == works.end() ? nullptr : it->second.t;
}

//
// rows
//

void semcache_store::layer::put_counts() const {
    const size_t size = row_count.size() * sizeof(int32_t);
    ggml_backend_tensor_set(rows, row_first.data(), 0, size);
    ggml_backend_tensor_set(rows, row_count.data(), size, size);
}

void semcache_store::layer::get_counts() {
    const size_t size = row_count.size() * sizeof(int32_t);
    ggml_backend_tensor_get(rows, row_count.data(), size, size);
}

semcache_store::layer * semcache_store::find(const ggml_tensor * k_stage) {
    const auto l = std::find_if(layers.begin(), layers.end(), [&](const layer & l) { return l.k_stage == k_stage; });
    return k_stage && l != layers.end() ? &*l : nullptr;
}

void semcache_store::note_attention(layer & l, uint32_t il, float scale, bool is_turned, const ggml_tensor * q_weight) {
    if (il != l.il && (l.shape.scale != scale || (l.rope != 0) != is_turned)) {
        throw semcache_error(
            SEMCACHE_ERR_MODEL, "compressing the KV cache: expected layer " + std::to_string(il) +
                                    " to attend as layer " + std::to_string(l.il) +
                                    " does, whose K and V it reads, got another scale or RoPE; use this model "
                                    "without compression");
    }
    l.shape.scale = scale;
    if (!is_turned) {
        l.rope = 0;
    }
    const ggml_tensor *& known = l.q_weight_of[l.q_layer(il)];
    if (q_weight && q_weight != known) {
        known = q_weight;
        const size_t d = l.shape.n_embd_head_k;
        l.q_weight.resize(d * l.n_q_layer(), 1.0f);
        ggml_backend_tensor_get(q_weight, l.q_weight.data() + d * l.q_layer(il), 0, d * sizeof(float));
    }
}

size_t semcache_store::n_head_kv() const {
    return std::accumulate(
        layers.begin(), layers.end(), (size_t) 0, [](size_t n, const layer & l) { return n + l.n_head_kv(); });
}

void semcache_store::clear() {
    for (auto & l : layers) {
        std::fill(l.row_count.begin(), l.row_count.end(), 0);
        l.put_counts();
        const std::vector<uint8_t> none(ggml_nbytes(l.heads));
        ggml_backend_tensor_set(l.heads, none.data(), 0, none.size());
    }
}

void semcache_store::cut(int32_t chunk) {
    std::vector<int32_t> of;
    for (auto & l : layers) {
        for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
            int32_t & n = l.row_count[ih];
            of.resize(n);
            ggml_backend_tensor_get(l.origin, of.data(), l.row_first[ih] * sizeof(int32_t), n * sizeof(int32_t));
            while (n > params.n_sink && semcache::chunk_of(of[n - 1]) >= chunk) {
                --n;
            }
        }
        l.put_counts();
    }
}

semcache::pass_args semcache_store::args(const layer & l, bool v_trans, bool k_rotated) const {
    semcache::pass_args a = {};
    a.shape = l.shape;
    a.shape.n_gqa *= l.n_q_layer();
    a.n_q_layer = l.n_q_layer();
    a.q_weight = l.q_weight.empty() ? nullptr : l.q_weight.data();
    a.n_head_kv = l.n_head_kv();
    a.k = (uint8_t *) l.k->data;
    a.v = (uint8_t *) l.v->data;
    a.k_type = semcache::row_type_of(l.k->type);
    a.v_type = semcache::row_type_of(l.v->type);
    a.bias = (semcache::f16 *) l.bias->data;
    if (l.s_use->type == GGML_TYPE_F32) {
        a.s_policy = (float *) l.s_use->data;
    } else {
        a.s_use = (semcache::f16 *) l.s_use->data;
    }
    a.origin = (int32_t *) l.origin->data;
    a.n_row = l.row_first.back();
    a.row_first = (const int32_t *) l.rows->data;
    a.row_count = (int32_t *) l.rows->data + a.n_head_kv;
    a.heads = (semcache::f16 *) l.heads->data;
    a.n_sink = params.n_sink;

    const int64_t d_v = l.shape.n_embd_head_v, n_stage = params.n_stage, size = sizeof(semcache::f16);
    a.k_rotated = k_rotated;
    a.k_stage = (const uint8_t *) l.k_stage->data;
    a.k_cell_type = semcache::row_type_of(l.k_stage->type);
    a.k_head = (int64_t) ggml_row_size(l.k_stage->type, l.shape.n_embd_head_k);
    a.k_cell = (int64_t) l.k_stage->nb[1];
    a.v_stage = (const uint8_t *) l.v_stage->data;
    a.v_cell_type = semcache::row_type_of(l.v_stage->type);
    a.v_head = v_trans ? d_v * n_stage * size : (int64_t) ggml_row_size(l.v_stage->type, d_v);
    a.v_cell = v_trans ? size : (int64_t) l.v_stage->nb[1];
    a.v_elem = v_trans ? n_stage * size : size;
    a.vote_p4 = (float *) l.vote_p4->data;
    a.vote_p = (float *) l.vote_p->data;
    a.vote_head = n_stage;

    a.q = (const uint8_t *) l.q->data;
    a.q_type = semcache::row_type_of(l.q->type);
    a.q_row = (int64_t) l.q->nb[1];
    a.n_rot = 2 * (int32_t) ropes[l.rope].inv_freq.size();
    a.neox = ropes[l.rope].neox;
    a.tensors = { l.k, l.v, l.bias, l.s_use, l.heads, l.origin, l.rows, l.k_stage, l.v_stage, l.q, l.vote_p4,
        l.vote_p };
    return a;
}

//
// numbers
//

void semcache_store::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const {
    for (const auto & [ctx, buf] : ctxs_bufs) {
        sizes[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
    }
    for (const auto & [buft, w] : works) {
        sizes[buft] += ggml_backend_buffer_get_size(w.buf.get());
    }
}

void semcache_store::stats(semcache_stats & s) const {
    s.method = params.method;
    s.n_layer = (int32_t) layers.size();
    s.n_stage = params.n_stage;
    s.n_window = params.n_window;
    for (const auto & l : layers) {
        s.n_head_kv += l.n_head_kv();
        s.rows_allocated += l.row_first.back();
        s.rows_used += std::accumulate(l.row_count.begin(), l.row_count.end(), (int64_t) 0);
        s.core_bytes += allocated(l.k) + allocated(l.v) + allocated(l.bias) + allocated(l.rows) + allocated(l.heads);
        s.stage_bytes += ggml_nbytes(l.k_stage) + ggml_nbytes(l.v_stage);
        s.query_bytes += allocated(l.q);
        for (const ggml_tensor * t : { l.s_use, l.origin, l.vote_p4, l.vote_p }) {
            s.meta_bytes += allocated(t);
        }
    }
    for (const auto & [buft, w] : works) {
        s.work_bytes += ggml_backend_buffer_get_size(w.buf.get());
    }
    s.full_bytes = full_bytes;
}

int32_t semcache_store::head_stats(semcache_head_stats * heads, int32_t n) const {
    int32_t i = 0;
    for (const auto & l : layers) {
        for (int32_t ih = 0; ih < l.n_head_kv(); ++ih, ++i) {
            if (i < n) {
                const int32_t n_rot = 2 * (int32_t) ropes[l.rope].inv_freq.size();
                heads[i] = { (int32_t) l.il, ih, l.n_alloc(ih), l.row_count[ih], n_rot };
            }
        }
    }
    return i;
}
