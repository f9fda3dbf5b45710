// semcache-graph.cpp - proportional attention as part of llama.cpp's graphs

#include "semcache-parts.h"

#include "ggml-prop-attn.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"

namespace {

const semcache::timeline & timeline(const llama_kv_cache_context * mctx) { return mctx->get_semcache()->own().time; }

// Whether a graph attends to cores: also when memory is reserved for the largest one, before there is any token.
bool has_cores(const llama_kv_cache_context * mctx) {
    const llama_semcache * semcache = mctx->get_semcache();
    return semcache->has_cores() || semcache->own().n_stage_used() == 0;
}

// Tokens of a batch whose queries vote, and the rows of the query ring that they go to.
class llm_graph_input_semcache : public llm_graph_input_i {
public:
    llm_graph_input_semcache(ggml_context * ctx, const llama_kv_cache_context * mctx, const llama_ubatch & ubatch) :
        mctx(mctx), has_cores(::has_cores(mctx)), n_tokens(ubatch.n_tokens), n_vote(timeline(mctx).n_vote(n_tokens)),
        token(n_vote > 0 && n_vote < n_tokens ? ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_vote) : nullptr),
        row(n_vote > 0 ? ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_vote) : nullptr) {
        for (ggml_tensor * t : { token, row }) {
            if (t) {
                ggml_set_input(t);
            }
        }
    }

    // As many tokens as could vote at the most, so that the graph does not depend on where the batch begins.
    void set_input(const llama_ubatch * ubatch) override {
        if (!row) {
            return;
        }
        const semcache::timeline & time = timeline(mctx);
        std::vector<int32_t> tokens;
        std::vector<int64_t> rows;
        for (int32_t i = 0; i < n_tokens; ++i) {
            if (time.is_voter(ubatch->pos[i])) {
                tokens.push_back(i);
                rows.push_back(time.ring_row(ubatch->pos[i]));
            }
        }
        tokens.resize(n_vote, 0);
        rows.resize(n_vote, time.ring_end());
        if (token) {
            ggml_backend_tensor_set(token, tokens.data(), 0, ggml_nbytes(token));
        }
        ggml_backend_tensor_set(row, rows.data(), 0, ggml_nbytes(row));
    }

    // The op reads the rows in use when it runs: only the first ones change the graph.
    bool can_reuse(const llm_graph_params & params) override {
        mctx = semcache_find(params.mctx);
        return mctx && n_tokens == (int32_t) params.ubatch.n_tokens && has_cores == ::has_cores(mctx);
    }

    const llama_kv_cache_context * mctx;
    const bool has_cores;
    const int32_t n_tokens, n_vote;
    ggml_tensor * token; // I32 [n_vote], NULL if all vote or none
    ggml_tensor * row;   // I64 [n_vote], NULL if none vote
};

llm_graph_input_semcache * graph_input(const llm_graph_context & graph, const llama_kv_cache_context * mctx) {
    for (auto & input : graph.res->inputs) {
        if (auto * ours = dynamic_cast<llm_graph_input_semcache *>(input.get())) {
            return ours;
        }
    }
    auto input = std::make_unique<llm_graph_input_semcache>(graph.ctx0, mctx, graph.ubatch);
    return (llm_graph_input_semcache *) graph.res->add_input(std::move(input));
}

// How queries came about, told by how they were computed: some models leave layers out, each in a way of its own.
struct query_history {
    bool is_turned = false;               // by RoPE
    const ggml_tensor * weight = nullptr; // [n_embd_head_k] that they were multiplied by after that
};

[[noreturn]] void refuse_queries(const std::string & arch, const char * what) {
    throw semcache_error(
        SEMCACHE_ERR_MODEL, "compressing the KV cache: expected queries as RoPE, or a norm behind it, left them, got " +
                                arch + ", which " + what + "; use this model without compression");
}

query_history history_of(const ggml_tensor * q, const std::string & arch) {
    query_history res;
    for (const ggml_tensor * t = q; t;) {
        switch (t->op) {
            case GGML_OP_ROPE: res.is_turned = true; return res;
            case GGML_OP_MUL:
                if (const ggml_tensor * w = t->src[1]; w->ne[0] > 1) {
                    const bool is_weight = w->buffer && w->type == GGML_TYPE_F32 && ggml_nelements(w) == q->ne[0];
                    if (!is_weight || res.weight) {
                        refuse_queries(arch, "multiplies them by more than one weight a channel");
                    }
                    res.weight = w;
                }
                break;
            case GGML_OP_CONCAT: refuse_queries(arch, "turns a part of them that does not begin a head");
            case GGML_OP_MUL_MAT:
                if (t->op_params[1] == GGML_HINT_SRC0_IS_HADAMARD) { // for a quantized stage
                    t = t->src[1];
                    continue;
                }
                return {};
            case GGML_OP_MUL_MAT_ID: return {};
            default: break;
        }
        t = t->src[0];
    }
    return {};
}

} // namespace

ggml_tensor * semcache_build_attn(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
    ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int il) {
    const llama_kv_cache_context * mctx = semcache_find(graph.mctx);
    llama_semcache::parts * own = mctx ? &mctx->get_semcache()->own() : nullptr;
    semcache_store::layer * l = own ? own->store.find(k->view_src) : nullptr;
    if (!l) {
        return nullptr;
    }
    ggml_context * ctx = graph.ctx0;
    const query_history history = history_of(q, own->arch);
    own->store.note_attention(*l, il, kq_scale, history.is_turned, history.weight);

    // the voters' queries go to the ring
    if (q->nb[1] != ggml_row_size(q->type, q->ne[0]) || q->nb[2] != q->nb[1] * q->ne[1]) {
        q = ggml_cont(ctx, q);
    }
    const auto * input = graph_input(graph, mctx);
    if (input->row) {
        ggml_tensor * q_rows = ggml_reshape_2d(ctx, q, q->ne[0] * q->ne[1], q->ne[2]);
        if (input->token) {
            q_rows = ggml_get_rows(ctx, q_rows, input->token);
        }
        ggml_tensor * ring = l->q;
        if (l->n_q_layer() > 1) { // a row holds the queries of the layer itself, then those of its readers
            ring = ggml_view_2d(ctx, ring, q_rows->ne[0], ring->ne[1], ring->nb[1],
                l->q_layer(il) * ggml_row_size(ring->type, q_rows->ne[0]));
        }
        ggml_build_forward_expand(graph.gf, ggml_set_rows(ctx, ring, q_rows, input->row));
    }
    if (!input->has_cores && k->type == GGML_TYPE_F16) {
        return nullptr; // upstream's own attention, to the bit
    }

    ggml_tensor * cur = ggml_prop_attn(ctx, q, k, v, kq_mask, l->k, l->v, l->bias, l->rows, l->heads, sinks, kq_scale,
        l->shape.softcap, own->k_rotated());
    if (own->store.in_host_memory(*l)) { // else a card that has the queries would have all rows copied to it
        ggml_backend_sched_set_tensor_backend(graph.sched, cur, graph.backend_cpu);
    }
    ggml_build_forward_expand(graph.gf, cur);
    return cur;
}
