// semcache-cache.cpp - llama_semcache: what llama_kv_cache and its relatives pass through

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"
#include "semcache-parts.h"

#include <algorithm>

//
// parts
//

namespace {

std::vector<bool> delimiters(const llama_vocab & vocab) {
    std::vector<bool> res(vocab.n_tokens());
    // tokens that can be asked what they say
    const size_t n_text = vocab.get_type() == LLAMA_VOCAB_TYPE_NONE ? 0 : res.size();
    for (size_t i = 0; i < n_text; ++i) {
        res[i] = vocab.is_control(i) || semcache::is_delimiter(vocab.token_to_piece(i));
    }
    return res;
}

semcache::timeline_params timeline_of(const semcache_params & p) {
    static_assert((int) semcache::method::semantic == SEMCACHE_METHOD_SEMANTIC &&
                  (int) semcache::method::paper == SEMCACHE_METHOD_PAPER &&
                  (int) semcache::method::streaming == SEMCACHE_METHOD_STREAMING &&
                  (int) semcache::method::keydiff == SEMCACHE_METHOD_KEYDIFF &&
                  (int) semcache::method::knorm == SEMCACHE_METHOD_KNORM &&
                  (int) semcache::method::snapkv == SEMCACHE_METHOD_SNAPKV &&
                  (int) semcache::method::tova == SEMCACHE_METHOD_TOVA &&
                  (int) semcache::method::h2o == SEMCACHE_METHOD_H2O);
    semcache::timeline_params t = {};
    t.how = (semcache::method) p.method;
    t.merge = p.merge != 0;
    t.distinct = p.distinct;
    t.n_stage = p.n_stage;
    t.n_window = p.n_window;
    t.n_sink = p.n_sink;
    t.n_chunk = p.n_chunk;
    t.n_horizon = p.n_horizon;
    t.seed = p.seed;
    // calibration keeps all queries of the text
    t.vote_every = p.calibrate ? 1 : semcache::asks_queries(t.how) ? semcache::VOTE_EVERY : 0;
    t.n_ring = p.calibrate ? p.n_stage : p.n_stage - p.n_window;
    return t;
}

// map: layers of the model to those of the cache.
template <typename L, typename M> std::vector<semcache_stage_layer> stage_layers(const L & layers, const M & map) {
    std::vector<semcache_stage_layer> res;
    for (const auto & l : layers) {
        res.push_back({ l.il, l.k, l.v, {} });
    }
    for (const auto & [il, i] : map) {
        if (res[i].il != (uint32_t) il) {
            res[i].readers.push_back(il);
        }
    }
    for (auto & l : res) {
        std::sort(l.readers.begin(), l.readers.end());
    }
    return res;
}

} // namespace

llama_semcache::parts::parts(llama_kv_cache & kv, const llama_semcache_scope & scope, bool v_trans) :
    lctx(scope.lctx), kv(kv), v_trans(v_trans), arch(scope.model.arch_name()), n_ctx((int32_t) scope.cparams.n_ctx),
    delimiter(delimiters(scope.model.vocab)), time(timeline_of(scope.config->params)),
    store(stage_layers(kv.layers, kv.map_layer_ids), scope, time.ring_end() + 1) {
    kv.attn_rot_v = false; // rotating 8 bits of a value gains nothing (docs/decisions.md)
    kv.attn_rot_k = kv.attn_rot_k && kv.n_embd_head_k_all % 64 == 0; // else llama.cpp's blocks cross heads
    if (scope.config->params.calibrate) {
        scope.cparams.cb_eval = semcache_residual::observe;
        scope.cparams.cb_eval_user_data = &residual;
    }
}

semcache::stage_tokens llama_semcache::parts::collect() const {
    const auto & cells = kv.v_cells[0];
    semcache::stage_tokens st;
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i)) {
            st.cell.push_back(i);
        }
    }
    std::sort(
        st.cell.begin(), st.cell.end(), [&](int32_t a, int32_t b) { return cells.pos_get(a) < cells.pos_get(b); });
    for (int32_t i : st.cell) {
        const int32_t tok = cells.ext_get(i).tok;
        st.pos.push_back(cells.pos_get(i));
        st.tok.push_back(tok);
        st.is_delimiter.push_back(tok >= 0 && (size_t) tok < delimiter.size() && delimiter[tok]);
    }
    return st;
}

bool llama_semcache::parts::k_rotated() const { return kv.attn_rot_k; }

int32_t llama_semcache::parts::n_stage_used() const { return (int32_t) kv.v_cells[0].get_used(); }

llama_pos llama_semcache::parts::pos_max() const { return kv.v_cells[0].seq_pos_max(0); }

void llama_semcache::parts::synchronize() const {
    if (lctx.get_sched()) { // else the context is still being built
        ggml_backend_sched_synchronize(lctx.get_sched());
    }
}

void llama_semcache::parts::clear() {
    synchronize();
    store.clear();
    time.clear();
    rows_merged = rows_dropped = 0;
    residual.clear();
}

//
// llama_semcache
//

llama_semcache::llama_semcache(std::unique_ptr<parts> p) : p(std::move(p)) {}

llama_semcache::~llama_semcache() = default;

bool llama_semcache::has_cores() const { return p->time.has_cores(); }

llama_pos llama_semcache::pos_begin() const { return p->time.pos_begin(); }

llama_pos llama_semcache::pos_end() const { return p->time.pos_end(); }

void llama_semcache::clear() { p->clear(); }

void llama_semcache::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const {
    p->store.memory_breakdown(sizes);
}

bool llama_semcache::make_room(const llama_ubatch & ubatch) {
    const auto [first, last] = std::minmax_element(ubatch.pos, ubatch.pos + ubatch.n_tokens);
    const int32_t n_used = p->n_stage_used(), n_stage = p->store.params.n_stage;
    if (n_used == 0 && !has_cores()) {
        p->time.start(*first); // a text may begin anywhere
    }
    try {
        if (!ubatch.token && ubatch.n_pos > 1) {
            throw semcache_error(
                SEMCACHE_ERR_STATE, "batch: expected tokens, got embeddings with " + std::to_string(ubatch.n_pos) +
                                        " positions each, as of a picture, which a compressed KV cache cannot hold; "
                                        "leave pictures out, or load the model without compression");
        }
        if (p->time.ring_holds(*first, *last) && n_used + (int32_t) ubatch.n_tokens <= n_stage) {
            return true;
        }
        if (!p->time.can_plan(n_used, p->pos_max())) {
            throw semcache_error(
                SEMCACHE_ERR_STATE, "batch: expected tokens that follow position " + std::to_string(p->pos_max()) +
                                        ", got " + std::to_string(ubatch.n_tokens) + " from position " +
                                        std::to_string(*first) + "; remove what is to be read again first");
        }
        if (!p->time.ring_holds_behind(p->pos_max(), *last)) {
            throw semcache_error(SEMCACHE_ERR_STATE, "batch: expected tokens close behind position " +
                                                         std::to_string(p->pos_max()) + ", got one at " +
                                                         std::to_string(*last) + "; number them without a gap");
        }
        p->run_pass((int32_t) ubatch.n_tokens);
        return true;
    } catch (const std::bad_alloc &) {
        semcache_set_error(SEMCACHE_ERR_MEMORY,
            "pass: expected memory for its scratch, got none; the cache is as it was: free memory or lower n_stage");
    } catch (const std::exception & err) {
        semcache_set_error(SEMCACHE_ERR_STATE, err.what());
    }
    LLAMA_LOG_ERROR("%s: %s\n", __func__, semcache_last_error());
    return false;
}

bool llama_semcache::can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const llama_pos pos_max = std::max(pos_end() - 1, p->pos_max());
    if (seq_id > 0 || p0 > pos_max || !has_cores()) {
        return true;
    }
    const bool to_end = p1 < 0 || p1 > pos_max;
    return p0 <= pos_begin() ? to_end : p0 >= pos_end() || (to_end && p->time.floor(p0) == p0);
}

void llama_semcache::rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id > 0) {
        return;
    }
    if (p1 > p->pos_max()) { // what comes behind the last token that stays votes anew
        const auto & tokens = p->kv.v_cells[0].seq_pos_get(0);
        const auto gone = tokens.lower_bound({ std::max(p0, 0), 0 });
        const llama_pos stays = gone == tokens.begin() ? 0 : std::prev(gone)->first + 1;
        p->time.ask_again(std::max(stays, std::min(pos_end(), std::max(p0, 0))));
    }
    if (!has_cores() || p0 >= pos_end()) {
        return;
    }
    if (p0 <= pos_begin()) {
        clear();
        return;
    }
    p->synchronize();
    const int32_t chunk = p->time.chunk_from(p0);
    p->store.cut(chunk);
    p->time.cut(chunk, p0);
}

//
// caches with sliding-window layers beside this one
//

bool llama_semcache::parts::window_is_held(const llama_kv_cache_iswa & kv, llama_pos pos) {
    const llama_kv_cache & swa = *kv.get_swa();
    return swa.seq_pos_min(0) <= std::max(kv.get_base()->seq_pos_min(0), pos - (llama_pos) swa.n_swa + 1);
}

bool llama_semcache::can_rm(const llama_kv_cache_iswa & kv, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const auto & store = kv.get_base()->semcache;
    if (!store || p0 > kv.get_swa()->seq_pos_max(0)) {
        return true;
    }
    const bool whole = p0 <= std::max(0, kv.get_base()->seq_pos_min(0));
    return store->can_rm(seq_id, p0, p1) && (whole || parts::window_is_held(kv, p0));
}

llama_pos llama_semcache::parts::floor(const llama_memory_i & memory, llama_pos pos) const {
    if (const auto * iswa = dynamic_cast<const llama_kv_cache_iswa *>(&memory)) {
        const llama_pos res = time.floor(pos);
        return res > iswa->get_swa()->seq_pos_max(0) || window_is_held(*iswa, res) ? res : 0;
    }
    if (dynamic_cast<const llama_kv_cache *>(&memory)) {
        return time.floor(pos);
    }
    return pos > memory.seq_pos_max(0) ? pos : 0; // a recurrent state cannot be cut
}

void llama_semcache::parts::stats(semcache_stats & s) const {
    s = {};
    store.stats(s);
    s.n_ctx = n_ctx;
    s.n_batch = (int32_t) lctx.n_batch();
    s.n_tokens_stage = n_stage_used();
    s.n_tokens = std::max(time.pos_end() - 1, pos_max()) + 1;
    s.rows_merged = rows_merged;
    s.rows_dropped = rows_dropped;
    s.n_pass = n_pass;
    s.pass_us = pass_us;
    s.pass_last_us = pass_last_us;
}
