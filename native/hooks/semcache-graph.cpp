// semcache-graph.cpp - proportional attention as part of llama.cpp's graphs

#include "semcache-store.h"

#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "sc-attn.h"

namespace {

// Cells that the tokens of a batch go to: the rows of the query ring.
class llm_graph_input_semcache : public llm_graph_input_i {
public:
    llm_graph_input_semcache(ggml_context * ctx, const llama_kv_cache_context * mctx, const llama_ubatch & ubatch) :
        mctx(mctx), has_cores(mctx->get_semcache()->has_cores()), idxs(mctx->build_input_k_idxs(ctx, ubatch)) {}

    void set_input(const llama_ubatch * ubatch) override { mctx->set_input_k_idxs(idxs, ubatch); }

    // The kernel reads the rows in use from the store when it runs: only the first ones change the graph.
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

// Sources of the operation, in this order.
enum attn_src { SRC_Q, SRC_K, SRC_V, SRC_MASK, SRC_CORE_K, SRC_CORE_V, SRC_BIAS, SRC_SINKS, N_SRC };

// q [n_embd_head_k, n_head, n_tokens]; k and v [n_embd_head, n_head_kv, n_kv], as get_k and get_v of the cache return them
// (v of a transposed cache: [n_kv, n_head_kv, n_embd_head]).
semcache::attn_args args_of(const ggml_tensor * const * src, const llama_semcache::layer & l) {
    const ggml_tensor * q = src[SRC_Q], * k = src[SRC_K], * v = src[SRC_V], * mask = src[SRC_MASK];
    const bool v_trans = v->nb[1] > v->nb[2];
    semcache::attn_args a = {};
    a.n_embd_head_k = l.shape.n_embd_head_k;
    a.n_embd_head_v = l.shape.n_embd_head_v;
    a.n_head        = l.n_head;
    a.n_head_kv     = l.n_head_kv();
    a.n_tokens      = (int32_t) q->ne[2];
    a.n_kv          = (int32_t) k->ne[2];
    a.scale         = l.shape.scale;
    a.softcap       = l.shape.softcap;
    a.q = (const float *) q->data;
    a.q_head  = q->nb[1]/sizeof(float);
    a.q_token = q->nb[2]/sizeof(float);
    a.k = (const semcache::f16 *) k->data;
    a.k_head = k->nb[1]/sizeof(semcache::f16);
    a.k_cell = k->nb[2]/sizeof(semcache::f16);
    a.v = (const semcache::f16 *) v->data;
    a.v_head = v->nb[1]/sizeof(semcache::f16);
    a.v_cell = v_trans ? 1 : v->nb[2]/sizeof(semcache::f16);
    a.v_elem = v_trans ? v->nb[2]/sizeof(semcache::f16) : 1;
    a.mask       = mask->data;
    a.mask_f16   = mask->type == GGML_TYPE_F16;
    a.mask_token = mask->nb[1]/ggml_type_size(mask->type);
    a.sinks      = src[SRC_SINKS] ? (const float *) src[SRC_SINKS]->data : nullptr;
    a.k_core     = (const semcache::f16 *) src[SRC_CORE_K]->data;
    a.v_core     = (const semcache::f16 *) src[SRC_CORE_V]->data;
    a.bias       = (const float *) src[SRC_BIAS]->data;
    a.row_first  = l.row_first.data();
    a.row_count  = l.row_count.data();
    return a;
}

void op_attn(ggml_tensor * dst, int ith, int nth, void * layer) {
    semcache::attn_part(args_of(dst->src, *(const llama_semcache::layer *) layer), (float *) dst->data, ith, nth);
}

void op_reduce(ggml_tensor * dst, int ith, int nth, void * layer) {
    const ggml_tensor * part = dst->src[0];
    semcache::attn_reduce(args_of(part->src, *(const llama_semcache::layer *) layer), (const float *) part->data, (float *) dst->data, ith, nth);
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

    // the tokens' queries go to the ring, to the rows of their cells
    if (q->nb[1] != ggml_row_size(q->type, q->ne[0]) || q->nb[2] != q->nb[1]*q->ne[1]) {
        q = ggml_cont(ctx, q);
    }
    ggml_tensor * q_rows = ggml_reshape_2d(ctx, q, q->ne[0]*q->ne[1], q->ne[2]);
    const auto * input = graph_input(graph, mctx);
    ggml_build_forward_expand(graph.gf, ggml_set_rows(ctx, l->q, q_rows, input->idxs));
    if (!input->has_cores) {
        return nullptr; // upstream's own attention, to the bit
    }

    ggml_tensor * src[N_SRC] = { q, k, v, kq_mask, l->k, l->v, l->bias, sinks };
    const int     n_src      = sinks ? N_SRC : SRC_SINKS;
    const int64_t n_embd     = (int64_t) l->shape.n_embd_head_v*l->n_head;
    const int64_t n_tokens   = q->ne[2];

    ggml_tensor * cur;
    if (semcache::attn_n_part(n_tokens) == 1) {
        cur = ggml_custom_4d(ctx, GGML_TYPE_F32, n_embd, n_tokens, 1, 1, src, n_src, op_attn, GGML_N_TASKS_MAX, l);
    } else {
        semcache::attn_args a = {};
        a.n_embd_head_v = l->shape.n_embd_head_v;
        a.n_head        = l->n_head;
        a.n_tokens      = (int32_t) n_tokens;
        ggml_tensor * part = ggml_custom_4d(ctx, GGML_TYPE_F32, semcache::attn_part_size(a), 1, 1, 1, src, n_src, op_attn, GGML_N_TASKS_MAX, l);
        // the parts' own sources are named again, so that they stay allocated until the reduction has read its strides
        ggml_tensor * red[] = { part, q, k, v, kq_mask, l->k, l->v, l->bias, sinks };
        cur = ggml_custom_4d(ctx, GGML_TYPE_F32, n_embd, n_tokens, 1, 1, red, n_src + 1, op_reduce, GGML_N_TASKS_MAX, l);
    }
    ggml_build_forward_expand(graph.gf, cur);
    return cur;
}
