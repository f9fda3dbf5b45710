// semcache-pass.cpp - passes and calibration, run as graphs where the rows are

#include "ggml-prop-attn.h"
#include "gpu/pass-layout.h"
#include "llama-context.h"
#include "llama-kv-cache.h"
#include "pass/task.h"
#include "semcache-parts.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <list>
#include <memory>

namespace {

// The context's backend of a device, or, of NULL, the one that computes on the CPU, set to this many threads.
ggml_backend_t backend_of(llama_context & lctx, ggml_backend_dev_t dev, int32_t n_threads) {
    ggml_backend_sched_t sched = lctx.get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        ggml_backend_dev_t its = ggml_backend_get_device(backend);
        if (dev && its == dev) {
            return backend;
        }
        if (!dev && its && ggml_backend_dev_type(its) == GGML_BACKEND_DEVICE_TYPE_CPU) {
            auto * reg = ggml_backend_dev_backend_reg(its);
            auto * set_n_threads =
                (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
            if (set_n_threads) {
                set_n_threads(backend, n_threads);
            }
            return backend;
        }
    }
    throw semcache_error(SEMCACHE_ERR_STATE, std::string("pass: expected a backend for ") +
                                                 (dev ? ggml_backend_dev_name(dev) : "the CPU") +
                                                 ", got none; build llama.cpp with one");
}

// A graph of one node, for all layers of a backend; rows: of one of them.
void compute(ggml_backend_t backend, ggml_prop_attn_kind kind, const void * task, ggml_tensor * rows, int64_t serial) {
    const size_t size = ggml_graph_overhead_custom(8, false) + ggml_tensor_overhead() + 1024;
    const ggml_context_ptr ctx(ggml_init({ size, nullptr, /*.no_alloc =*/true }));
    if (!ctx) {
        throw std::bad_alloc();
    }
    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), 8, false);
    ggml_tensor * node = ggml_prop_attn_task(ctx.get(), kind, task, rows, (int32_t) serial);
    ggml_backend_view_init(node);
    ggml_build_forward_expand(gf, node);
    const ggml_status status = ggml_backend_graph_compute(backend, gf);
    // an abort is looked for behind a node: this one has run, and the next graph stops
    if (status != GGML_STATUS_SUCCESS && status != GGML_STATUS_ABORTED) {
        throw semcache_error(SEMCACHE_ERR_STATE,
            std::string("pass: expected its graph to run, got ") + ggml_status_to_string(status) + "; see the log");
    }
}

// Scratch of every thread: thread i takes no job before the i-th, the largest come first.
class thread_scratch {
public:
    thread_scratch(const std::vector<semcache::pass_job> & jobs, const semcache::pass_plan & plan, int32_t n_threads) {
        std::vector<size_t> sizes(n_threads + 1);
        size_t most = 0;
        for (size_t i = jobs.size(); i-- > 0;) {
            const semcache::pass_sizes n = { jobs[i].n_used + plan.n_token(), plan.n_sink + plan.n_new, plan.n_voter };
            most = std::max(most, semcache::pass_scratch_size(jobs[i].layer->shape, n));
            if (i < (size_t) n_threads) {
                sizes[i] = most;
            }
        }
        size_t total = semcache::arena::ALIGNMENT;
        for (size_t size : sizes) {
            total += size;
        }
        memory.reset(new uint8_t[total]); // not initialized
        uint8_t * p = semcache::arena::align(memory.get());
        for (size_t size : sizes) {
            of.push_back(p);
            p += size;
        }
    }

    std::vector<uint8_t *> of; // [n_threads]

private:
    std::unique_ptr<uint8_t[]> memory;
};

// A layer whose rows are on a device that computes no passes, copied to host memory for one.
class host_layer {
public:
    explicit host_layer(const semcache_store::layer & of) : l(of), of(of) {
        ctx.reset(ggml_init({ (std::size(READ) + std::size(WRITTEN)) * ggml_tensor_overhead(), nullptr, true }));
        if (!ctx) {
            throw std::bad_alloc();
        }
        for_all([&](auto t) { l.*t = ggml_dup_tensor(ctx.get(), of.*t); });
        buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()));
        if (!buf) {
            throw std::bad_alloc();
        }
        for_all([&](auto t) { ggml_backend_tensor_get(of.*t, (l.*t)->data, 0, ggml_nbytes(of.*t)); });
    }

    void put_back() const {
        for (auto t : WRITTEN) {
            ggml_backend_tensor_set(of.*t, (l.*t)->data, 0, ggml_nbytes(of.*t));
        }
    }

    semcache_store::layer l;

private:
    typedef semcache_store::layer layer;
    static constexpr ggml_tensor * layer::* READ[] = { &layer::k_stage, &layer::v_stage, &layer::q };
    static constexpr ggml_tensor * layer::* WRITTEN[] = { &layer::k, &layer::v, &layer::bias, &layer::s_use,
        &layer::origin, &layer::heads, &layer::rows, &layer::vote_p4, &layer::vote_p };

    template <typename F> void for_all(F && f) {
        std::for_each(std::begin(READ), std::end(READ), f);
        std::for_each(std::begin(WRITTEN), std::end(WRITTEN), f);
    }

    const semcache_store::layer & of;
    ggml_context_ptr ctx;
    ggml_backend_buffer_ptr buf;
};

// A pass over the layers whose rows are in one device's memory, or in the host's.
class backend_pass {
public:
    // work: of a device's.
    backend_pass(ggml_backend_dev_t dev, ggml_backend_t backend, ggml_tensor * work, ggml_tensor * rows) :
        dev(dev), backend(backend), work(work), rows(rows) {}

    const ggml_backend_dev_t dev; // NULL: the CPU's

    void add(const semcache_store::layer & l, const semcache::pass_args & a) {
        for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
            jobs.push_back({ &a, ih, l.row_count[ih], l.n_alloc(ih) });
        }
    }

    // All memory that it needs.
    void prepare(const semcache::pass_plan & plan, int32_t n_threads) {
        std::stable_sort(jobs.begin(), jobs.end(), [](const auto & a, const auto & b) { return a.n_used > b.n_used; });
        results.resize(jobs.size());
        task = { &plan, jobs.data(), (int32_t) jobs.size(), nullptr, results.data(), nullptr, 0, work };
        if (!work) {
            scratch = std::make_unique<thread_scratch>(jobs, plan, n_threads);
            task.scratch = scratch->of.data();
            return;
        }
        task.work = (uint8_t *) work->data;
        task.n_work = (int64_t) ggml_nbytes(work);
        layout = std::make_unique<semcache::pass_layout>(task);
        if (layout->least_work() > task.n_work) {
            throw semcache_error(SEMCACHE_ERR_STATE, "pass: expected work of at most " + std::to_string(task.n_work) +
                                                         " bytes, got " + std::to_string(layout->least_work()) +
                                                         "; please report it");
        }
        moved = layout->upload();
    }

    void run(int64_t serial) {
        if (work) {
            ggml_backend_tensor_set(work, moved.data(), 0, moved.size());
        }
        compute(backend, GGML_PROP_ATTN_PASS, &task, rows, serial);
        if (work) {
            moved.resize(layout->counts_size());
            ggml_backend_tensor_get(work, moved.data(), 0, moved.size());
            if (!layout->read_counts(moved, task)) {
                throw semcache_error(SEMCACHE_ERR_STATE, std::string("pass: expected its kernels to run on ") +
                                                             ggml_backend_name(backend) +
                                                             ", got other counts; see the log, and clear the cache, "
                                                             "whose older tokens may be lost");
            }
        }
    }

    std::vector<semcache::pass_result> results;

private:
    ggml_backend_t backend;
    ggml_tensor *work, *rows;
    std::vector<semcache::pass_job> jobs;
    std::unique_ptr<thread_scratch> scratch;
    std::unique_ptr<semcache::pass_layout> layout;
    std::vector<uint8_t> moved; // to and from a device
    semcache::pass_task task = {};
};

} // namespace

void llama_semcache::parts::run_pass(int32_t n_room) {
    const int64_t t_start = ggml_time_us();
    synchronize();
    const int32_t n_threads = std::clamp(lctx.get_cparams().n_threads_batch, 1, (int32_t) store.n_head_kv());
    semcache::planned_pass next = time.plan(collect(), n_room);

    // whatever can fail comes before a graph runs
    const bool makes_frames = !time.has_cores() && next.n_stop > 0 && store.params.type_k != GGML_TYPE_F16;
    std::vector<int64_t> back; // to position 0
    for (int32_t i = 0; makes_frames && i < next.tokens.n(); ++i) {
        back.push_back(-(int64_t) next.tokens.pos[i]);
    }
    std::vector<std::vector<float>> turns(store.ropes.size()), backs(turns.size()), means(turns.size());
    for (size_t i = 0; i < turns.size(); ++i) {
        store.ropes[i].table(next.turn, turns[i]);
        if (makes_frames) {
            store.ropes[i].table(back, backs[i]);
            store.ropes[i].mean_table(next.pos_begin, n_ctx, means[i]);
        }
    }
    std::list<host_layer> copies;
    std::list<semcache::pass_args> args;
    std::list<backend_pass> passes;
    for (const auto & l : store.layers) {
        ggml_tensor * work = store.work(l);
        const bool is_copy = !work && !store.in_host_memory(l);
        const semcache_store::layer & here = is_copy ? copies.emplace_back(l).l : l;
        semcache::pass_args & a = args.emplace_back(store.args(here, v_trans, k_rotated()));
        a.turn = turns[l.rope].data();
        a.makes_frame = makes_frames;
        if (makes_frames) {
            a.back = backs[l.rope].data();
            a.mean_turn = means[l.rope].data();
        }
        ggml_backend_dev_t dev =
            work ? ggml_backend_buft_get_device(ggml_backend_buffer_get_type(work->buffer)) : nullptr;
        auto pass = std::find_if(passes.begin(), passes.end(), [&](const auto & p) { return p.dev == dev; });
        if (pass == passes.end()) {
            pass = passes.emplace(pass, dev, backend_of(lctx, dev, n_threads), work, here.rows);
        }
        pass->add(here, a);
    }
    for (backend_pass & pass : passes) {
        pass.prepare(next.plan, n_threads);
    }

    for (backend_pass & pass : passes) {
        pass.run(n_pass);
        for (const semcache::pass_result & r : pass.results) {
            rows_merged += r.n_merged;
            rows_dropped += r.n_dropped;
        }
    }
    for (const host_layer & copy : copies) {
        copy.put_back();
    }
    for (auto & l : store.layers) {
        l.get_counts();
    }
    auto & cells = kv.v_cells[0];
    for (int32_t i = 0; i < next.n_stop; ++i) {
        cells.rm(next.tokens.cell[i]);
    }
    if (next.n_stop > 0) {
        kv.v_heads[0] = 0;
    }
    time.commit(std::move(next));
    ++n_pass;
    pass_last_us = ggml_time_us() - t_start;
    pass_us += pass_last_us;
}

void llama_semcache::parts::calibrate_add() {
    const semcache_params & params = store.params;
    semcache::calibrate_params cp = {};
    cp.n_probe = 256;
    cp.n_skip = 8;
    cp.merge = params.merge != 0;
    cp.distinct = 0; // budgets are better by what is asked for alone: docs/decisions.md, 43
    cp.n_pass = semcache::CALIBRATE_PASS;
    cp.n_window = params.n_window;
    cp.n_horizon = params.n_horizon;
    cp.seed = params.seed;

    // probes lie behind the window, and one pass at least comes before it
    const int32_t n_token = n_stage_used(), n_past = n_token - cp.n_window - cp.n_probe;
    if (!params.calibrate || time.has_cores() || n_past <= params.n_sink) {
        throw semcache_error(SEMCACHE_ERR_STATE,
            "calibration: expected one text of more than " + std::to_string(params.n_sink + cp.n_window + cp.n_probe) +
                " tokens that lies wholly in the stage, in a context made with calibrate = 1, got " +
                std::to_string(n_token) + " tokens" + (time.has_cores() ? " after a pass" : "") +
                (params.calibrate ? "" : " and calibrate = 0") +
                "; clear the cache and use a stage as large as the text");
    }
    lctx.synchronize();
    const semcache::stage_tokens st = collect();
    std::vector<int32_t> ring;
    for (int32_t pos : st.pos) {
        ring.push_back((int32_t) time.ring_row(pos));
    }
    std::vector<int32_t> chunk;
    semcache::chunker cut{ params.n_chunk, 0 };
    cut.run({ st.is_delimiter.begin() + params.n_sink, st.is_delimiter.begin() + n_past }, chunk);

    std::vector<semcache::pass_args> args;
    std::vector<semcache::calibrate_text> texts;
    std::vector<semcache::calibrate_job> jobs;
    std::vector<std::pair<int32_t, int32_t>> heads;
    args.reserve(store.layers.size());
    texts.reserve(store.layers.size());
    for (const auto & l : store.layers) {
        args.push_back(store.args(l, v_trans, k_rotated())); // a text's passes make their own turns
        texts.push_back({ &args.back(), &store.ropes[l.rope], st.pos.data(), st.cell.data(), chunk.data(), ring.data(),
            n_token, n_past, params.n_sink });
        for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
            jobs.push_back({ &texts.back(), ih });
            heads.emplace_back(l.il, ih);
        }
    }
    std::vector<std::vector<double>> errors(jobs.size());
    std::atomic<bool> failed{ false };
    const std::vector<double> portions = semcache::profile_parts();
    const semcache::calibrate_task task = { &cp, &portions, jobs.data(), (int32_t) jobs.size(), errors.data(),
        &failed };
    compute(backend_of(lctx, nullptr, std::max(1, lctx.get_cparams().n_threads_batch)), GGML_PROP_ATTN_CALIBRATE, &task,
        store.layers[0].rows, 0);
    if (failed) {
        throw std::bad_alloc();
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
