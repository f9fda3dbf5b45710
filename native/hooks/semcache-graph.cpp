// semcache-graph.cpp - proportional attention as part of llama.cpp's graphs

#include "semcache-store.h"

#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "ggml-prop-attn.h"

namespace {

// Rows of the query ring that the tokens of a batch go to.
class llm_graph_input_semcache : public llm_graph_input_i {
public:
    llm_graph_input_semcache(ggml_context * ctx, const llama_kv_cache_context * mctx, const llama_ubatch & ubatch) :
        mctx(mctx), has_cores(mctx->get_semcache()->has_cores()), idxs(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, ubatch.n_tokens)) {
        ggml_set_input(idxs);
    }

    void set_input(const llama_ubatch * ubatch) override {
        std::vector<int64_t> rows;
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            rows.push_back(mctx->get_semcache()->ring_row(ubatch->pos[i]));
        }
        ggml_backend_tensor_set(idxs, rows.data(), 0, rows.size()*sizeof(rows[0]));
    }

    // The op reads the rows in use when it runs: only the first ones change the graph.
    bool can_reuse(const llm_graph_params & params) override {
        mctx = semcache_find(params.mctx);
        return mctx && idxs->ne[0] == (int64_t) params.ubatch.n_tokens && has_cores == mctx->get_semcache()->has_cores();
    }

    const llama_kv_cache_context * mctx;
    const bool has_cores;
    ggml_tensor * idxs; // I64 [n_tokens]
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

} // namespace

ggml_tensor * semcache_build_attn(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                                  ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int il) {
    const llama_kv_cache_context * mctx = semcache_find(graph.mctx);
    llama_semcache::layer * l = mctx ? mctx->get_semcache()->find(il) : nullptr;
    if (!l || k->view_src != l->k_stage) {
        return nullptr;
    }
    ggml_context * ctx = graph.ctx0;
    l->shape.scale = kq_scale;

    // the tokens' queries go to the ring
    if (q->nb[1] != ggml_row_size(q->type, q->ne[0]) || q->nb[2] != q->nb[1]*q->ne[1]) {
        q = ggml_cont(ctx, q);
    }
    ggml_tensor * q_rows = ggml_reshape_2d(ctx, q, q->ne[0]*q->ne[1], q->ne[2]);
    const auto * input = graph_input(graph, mctx);
    ggml_build_forward_expand(graph.gf, ggml_set_rows(ctx, l->q, q_rows, input->idxs));
    if (!input->has_cores) {
        return nullptr; // upstream's own attention, to the bit
    }

    ggml_tensor * cur = ggml_prop_attn(ctx, q, k, v, kq_mask, l->k, l->v, l->bias, l->rows, sinks, kq_scale, l->shape.softcap);
    ggml_build_forward_expand(graph.gf, cur);
    return cur;
}
