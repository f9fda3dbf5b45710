// semcache-pass.cpp - runs a pass over all heads, or the calibration of them, on host memory and threads

#include "semcache-store.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "sc-calibrate.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <exception>
#include <numeric>
#include <thread>

using semcache::f16;

namespace {

semcache::row_type row_type_of(int32_t type) {
    return type == GGML_TYPE_Q8_0   ? semcache::row_type::q8_0
           : type == GGML_TYPE_Q4_0 ? semcache::row_type::q4_0
                                    : semcache::row_type::f16;
}

// Calls f(job, thread) for every job, and at the end throws again what one of them threw. Thread i gets no job before
// i, the main thread is 0. Does not fail for want of memory itself: rows may have been written already.
template <typename F> void run_jobs(size_t n_jobs, int32_t n_threads, F && f) {
    std::atomic<size_t> next{ (size_t) n_threads };
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error;
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

} // namespace

// A layer's tensors in host memory: the tensors themselves where the backend allows, else copies in an arena that was
// made large enough beforehand.
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

    host_layer(const layer & l, arena & a) :
        k_stage((f16 *) get(l.k_stage, a[0])), v_stage((f16 *) get(l.v_stage, a[1])), k((uint8_t *) get(l.k, a[3])),
        v((uint8_t *) get(l.v, a[4])), q(get(l.q, a[2])), bias((float *) get(l.bias, a[5])) {}

    // Copies of cores go back; a tensor in host memory already holds what was written.
    void write_back(const layer & l) {
        put(l.k, k);
        put(l.v, v);
        put(l.bias, bias);
    }

    f16 *k_stage, *v_stage;
    uint8_t *k, *v; // of the cores' types
    void * q;       // of the ring's type
    float * bias;

private:
    static std::array<ggml_tensor *, 6> tensors(const layer & l) {
        return { l.k_stage, l.v_stage, l.q, l.k, l.v, l.bias };
    }

    static void * get(ggml_tensor * t, std::vector<uint8_t> & copy) {
        if (ggml_backend_buffer_is_host(t->buffer)) {
            return t->data;
        }
        ggml_backend_tensor_get(t, copy.data(), 0, ggml_nbytes(t));
        return copy.data();
    }

    static void put(ggml_tensor * t, const void * p) {
        if (p != t->data) {
            ggml_backend_tensor_set(t, p, 0, ggml_nbytes(t));
        }
    }
};

// One head of one layer in a pass.
struct llama_semcache::job {
    layer * l;
    int32_t ih;
    semcache::head_rows rows;
    semcache::stage_rows stage;
    semcache::query_rows queries;
    semcache::pass_result result;
    int32_t n_rows; // candidates, sinks and window
};

// What a pass does, in numbers that are the same for all heads; nothing is changed by it.
struct llama_semcache::pass_plan {
    stage_tokens st;
    int32_t n_sink;                        // tokens of the stage that become sinks
    int32_t n_stop;                        // tokens that leave the stage, sinks included
    int32_t n_window;                      // tokens that stay
    std::vector<int32_t> ring;             // [n_voter] rows of the query ring
    std::vector<int32_t> voter;            // [n_voter] their tokens
    std::vector<int32_t> n_voted;          // [n_token] votes that each has had, as llama_semcache::n_voted
    std::vector<std::vector<float>> turns; // of each of ropes, by which the voters' queries are turned
    std::vector<int32_t> chunk;            // [n_stop - n_sink]
    std::vector<int32_t> chunk_start;      // afterwards
    semcache::chunker chunker;             // afterwards
};

llama_semcache::stage_tokens llama_semcache::collect() const {
    const auto & cells = kv.v_cells[0];
    stage_tokens st;
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i)) {
            st.cell.push_back(i);
        }
    }
    std::sort(
        st.cell.begin(), st.cell.end(), [&](int32_t a, int32_t b) { return cells.pos_get(a) < cells.pos_get(b); });
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

llama_semcache::job llama_semcache::make_job(layer & l, int32_t ih, const host_layer & host, const stage_tokens & st,
    int32_t n_sink, int32_t n_window, const std::vector<int32_t> & chunk, const std::vector<int32_t> & ring) const {
    const int64_t d_k = l.shape.n_embd_head_k, d_v = l.shape.n_embd_head_v, n_stage = params.n_stage,
                  first = l.row_first[ih];
    job j = {};
    j.l = &l;
    j.ih = ih;
    j.rows = {
        host.k + first * l.k->nb[1],
        host.v + first * l.v->nb[1],
        host.bias + first,
        l.meta.data() + first,
        l.row_first[ih + 1] - l.row_first[ih],
        has_cores() ? params.n_sink : 0,
        l.row_count[ih],
        row_type_of(params.type_k),
        row_type_of(params.type_v),
    };
    j.n_rows = l.row_count[ih] + (int32_t) st.cell.size();

    semcache::stage_rows & s = j.stage;
    s.k = host.k_stage + ih * d_k;
    s.k_cell = l.k_stage->ne[0];
    s.v = host.v_stage + ih * d_v * (v_trans ? n_stage : 1);
    s.v_cell = v_trans ? 1 : l.v_stage->ne[0];
    s.v_elem = v_trans ? n_stage : 1;
    s.cell = st.cell.data();
    s.chunk = chunk.data();
    s.n_sink = n_sink;
    s.n_window = n_window;
    s.n_new = (int32_t) st.cell.size() - n_sink - n_window;

    semcache::query_rows & q = j.queries;
    const int64_t first_q = (int64_t) ih * l.shape.n_gqa * d_k;
    if (l.q->type == GGML_TYPE_Q8_0) {
        q.q8 = (const semcache::q8_block *) host.q;
        q.q8_row = l.q->ne[0] / semcache::Q_BLOCK;
        q.q8_first = (int32_t) first_q;
    } else {
        q.q = (const f16 *) host.q + first_q;
        q.q_row = l.q->ne[0];
    }
    q.row = ring.data();
    q.n = (int32_t) ring.size();
    q.n_full = vote_every && !params.calibrate ? (params.n_stage - params.n_window - params.n_sink) / vote_every : 0;
    return j;
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
    return std::accumulate(
        layers.begin(), layers.end(), (size_t) 0, [](size_t n, const layer & l) { return n + l.n_head_kv(); });
}

bool llama_semcache::has_room(const std::vector<llama_ubatch> & ubatches) {
    llama_pos first = std::numeric_limits<llama_pos>::max(), last = -1;
    for (const auto & ubatch : ubatches) {
        const auto [lo, hi] = std::minmax_element(ubatch.pos, ubatch.pos + ubatch.n_tokens);
        first = std::min(first, *lo);
        last = std::max(last, *hi);
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

llama_semcache::pass_plan llama_semcache::plan_pass() const {
    pass_plan plan;
    plan.st = collect();
    const stage_tokens & st = plan.st;
    const int32_t n_tokens = (int32_t) st.cell.size();
    plan.n_sink = has_cores() ? 0 : params.n_sink;
    plan.n_stop = n_tokens - params.n_window;
    if (plan.n_stop <= plan.n_sink) {
        plan.n_sink = plan.n_stop = 0;
    }
    plan.n_window = n_tokens - plan.n_stop;

    plan.n_voted.resize(n_tokens);
    std::vector<int64_t> delta;
    for (int32_t i = 0; i < n_tokens; ++i) {
        if (st.pos[i] < n_asked) {
            plan.n_voted[i] = n_voted[st.cell[i]];
        } else if (is_voter(st.pos[i])) {
            plan.ring.push_back((int32_t) ring_row(st.pos[i]));
            plan.voter.push_back(i);
            // a row is asked when it has left the window; the methods of others ask from where the query is
            delta.push_back(params.method != SEMCACHE_METHOD_SEMANTIC
                                ? 0
                                : (int64_t) st.pos.back() + 1 + params.n_window +
                                      semcache::look_ahead(params.seed, st.pos[i], params.n_horizon) - st.pos[i]);
        }
    }
    plan.turns.resize(ropes.size());
    for (size_t r = 0; r < ropes.size(); ++r) {
        ropes[r].table(delta, plan.turns[r]);
    }

    plan.chunker = chunker;
    plan.chunk_start = chunk_start;
    if (plan.n_stop > 0) {
        plan.chunker.run(delimiters_of(st, plan.n_sink, plan.n_stop), plan.chunk);
        for (int32_t i = plan.n_sink; i < plan.n_stop; ++i) {
            if (i == plan.n_sink || plan.chunk[i - plan.n_sink] != plan.chunk[i - plan.n_sink - 1]) {
                plan.chunk_start.push_back(st.pos[i]);
            }
        }
    }
    return plan;
}

// Scratch for every thread: thread i gets no job of a group before its i'th, the largest come first (run_jobs).
std::vector<semcache::pass_workspace> llama_semcache::reserve_scratch(const pass_plan & plan, int32_t n_threads) const {
    std::vector<semcache::pass_workspace> ws(n_threads);
    for (const auto & group : groups()) {
        std::vector<std::pair<int32_t, const layer *>> sizes; // of the jobs, in the order of run_pass
        for (uint32_t i : group) {
            for (int32_t n : layers[i].row_count) {
                sizes.emplace_back(n + (int32_t) plan.st.cell.size(), &layers[i]);
            }
        }
        std::stable_sort(sizes.begin(), sizes.end(), [](const auto & a, const auto & b) { return a.first > b.first; });
        for (size_t ith = 0; ith < ws.size(); ++ith) {
            for (size_t i = ith; i < sizes.size(); ++i) {
                ws[ith].reserve(sizes[i].second->shape, sizes[i].first, plan.n_stop, (int32_t) plan.ring.size());
            }
        }
    }
    return ws;
}

semcache::pass_result llama_semcache::run_pass(const pass_plan & plan, int32_t n_threads) {
    semcache::pass_params pp;
    pp.how = (semcache::method) params.method;
    pp.merge = params.merge != 0;
    pp.distinct = params.distinct;

    // everything that can fail comes before the first row is written
    auto ws = reserve_scratch(plan, n_threads);
    host_layer::arena arena;
    std::vector<host_layer> host;
    std::vector<job> jobs;
    host.reserve(layers.size());
    jobs.reserve(kv_heads());
    for (const layer & l : layers) {
        host_layer::reserve(arena, l);
    }
    const auto all_groups = groups();

    semcache::pass_result sum = {};
    for (const auto & group : all_groups) {
        host.clear();
        jobs.clear();
        for (uint32_t i : group) {
            layer & l = layers[i];
            host.emplace_back(l, arena);
            for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
                job j = make_job(l, ih, host.back(), plan.st, plan.n_sink, plan.n_window, plan.chunk, plan.ring);
                j.stage.votes = l.votes.data() + (size_t) ih * params.n_stage;
                j.stage.n_voted = plan.n_voted.data();
                j.queries.cs = plan.turns[l.rope].data();
                j.queries.token = plan.voter.data();
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
            sum.n_merged += j.result.n_merged;
            sum.n_dropped += j.result.n_dropped;
        }
        for (size_t i = 0; i < group.size(); ++i) {
            host[i].write_back(layers[group[i]]);
            layers[group[i]].publish();
        }
    }
    return sum;
}

void llama_semcache::commit(pass_plan && plan, const semcache::pass_result & sum) {
    const stage_tokens & st = plan.st;
    auto & cells = kv.v_cells[0];
    for (int32_t i = 0; i < plan.n_stop; ++i) {
        cells.rm(st.cell[i]);
    }
    for (size_t i = plan.n_stop; i < st.cell.size(); ++i) {
        n_voted[st.cell[i]] = plan.n_voted[i] + (int32_t) plan.ring.size();
    }
    if (plan.n_stop > 0) {
        kv.v_heads[0] = 0;
        n_past = st.pos[plan.n_stop - 1] + 1;
    }
    n_asked = st.pos.back() + 1;
    chunker = plan.chunker;
    chunk_start = std::move(plan.chunk_start);
    rows_merged += sum.n_merged;
    rows_dropped += sum.n_dropped;
    ++n_pass;
}

void llama_semcache::pass(llama_context * lctx) {
    const int64_t t_start = ggml_time_us();
    ggml_backend_sched_synchronize(lctx->get_sched()); // the context's own would end the timing of the batch that waits
    pass_plan plan = plan_pass();
    const semcache::pass_result sum =
        run_pass(plan, std::clamp(lctx->get_cparams().n_threads_batch, 1, (int32_t) kv_heads()));
    commit(std::move(plan), sum);
    pass_last_us = ggml_time_us() - t_start;
    pass_us += pass_last_us;
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
            semcache_set_error(SEMCACHE_ERR_MEMORY, "pass: expected memory for its scratch, got none; the cache is as "
                                                    "it was: free memory or lower n_stage");
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
    llama_context * lctx;
};

} // namespace

llama_memory_context_ptr llama_semcache::init_pass(llama_context * lctx) {
    return std::make_unique<semcache_pass_context>(*this, lctx);
}

void llama_semcache::calibrate_add(llama_context * lctx) {
    // probes lie behind the window, and one pass at least comes before it
    const int32_t n_probe = 256, n_tokens = (int32_t) kv.v_cells[0].get_used();
    const int32_t n_stop = n_tokens - params.n_window - n_probe;
    if (!params.calibrate || has_cores() || n_stop <= params.n_sink) {
        throw semcache_error(SEMCACHE_ERR_STATE,
            "calibration: expected one text of more than " + std::to_string(params.n_sink + params.n_window + n_probe) +
                " tokens that lies wholly in the stage, in a context made with calibrate = 1, got " +
                std::to_string(n_tokens) + " tokens" + (has_cores() ? " after a pass" : "") +
                (params.calibrate ? "" : " and calibrate = 0") +
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
    cp.pass.distinct = 0; // budgets are better by what is asked for alone: docs/decisions.md, 43
    cp.n_window = params.n_window;
    cp.n_horizon = params.n_horizon;
    cp.seed = params.seed;

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
        std::vector<job> jobs;
        host.reserve(group.size());
        for (uint32_t i : group) {
            layer & l = layers[i];
            host.emplace_back(l, arena);
            for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
                jobs.push_back(make_job(l, ih, host.back(), st, params.n_sink, params.n_window + n_probe, chunk, ring));
                heads.emplace_back(l.il, ih);
            }
        }
        const size_t at = errors.size();
        errors.resize(at + jobs.size());
        run_jobs(jobs.size(), n_threads, [&](size_t i, int32_t ith) {
            const job & j = jobs[i];
            errors[at + i] = semcache::output_errors({ j.stage, j.queries, st.pos.data(), n_probe }, j.l->shape,
                ropes[j.l->rope], cp, semcache::profile_parts(), ws[ith]);
        });
    }
    for (size_t h = 0; h < heads.size(); ++h) {
        const double size = residual.size(heads[h].first);
        for (double & x : errors[h]) {
            x /= size;
            if (!std::isfinite(x)) {
                throw semcache_error(SEMCACHE_ERR_STATE,
                    "calibration: expected finite attention and a residual stream, got others in layer " +
                        std::to_string(heads[h].first) + "; the model file is damaged or of an unknown kind");
            }
        }
    }
    measured.add(heads, errors);
}
