// run-pass.h - the host's side of a pass on a device, the same for all of them
//
// A device D does in order what it is told:
//
//     put(to, from, n)    copies n bytes to its memory; `from` may change as soon as this returns
//     get(to, from, n)    copies n bytes from its memory and waits until they are there
//     pass_step<STEP>(n_piece, n_head, shared, m, x, w)    launches a kernel of pass.h, see pass_steps()

#pragma once

#include "pass-dims.h"
#include "pass.h"

#include <algorithm>
#include <vector>

namespace semcache {

// Hands out pieces of device memory.
class device_memory {
public:
    device_memory(uint8_t * begin, int64_t n) : at(begin), end(begin + n) {}

    template <typename T> T * take(int64_t n) {
        T * p = (T *) at;
        at += device_size<T>(n);
        return p;
    }

    uint8_t * rest() const { return at; }
    int64_t n_rest() const { return end - at; }

private:
    uint8_t *at, *end;
};

template <typename D> class device_pass {
public:
    device_pass(D & dev, const pass_task & task) : dev(dev), task(task), plan(*task.plan) {
        for (int32_t i = 0; i < task.n_job; ++i) {
            const pass_job & j = task.jobs[i];
            auto l = std::find_if(layers.begin(), layers.end(), [&](const auto & l) { return l.a == j.layer; });
            if (l == layers.end()) {
                l = layers.emplace(l, j.layer);
                n_head += j.layer->n_head_kv;
            }
            l->jobs[j.ih] = i;
        }
    }

    void run() {
        device_memory memory(task.work, task.n_work);
        int * counts = memory.take<int>(4 * n_head);
        pass_data x = {};
        put(memory, x.cell, plan.cell, plan.n_token());
        put(memory, x.n_voted, plan.n_voted, plan.n_token());
        put(memory, x.chunk, plan.chunk, plan.n_new);
        put(memory, x.voter_row, plan.voter_row, plan.n_voter);
        int * count = counts;
        for (const layer_jobs & l : layers) {
            run_layer(l, x, memory, count);
            count += 4 * l.a->n_head_kv;
        }
        std::vector<int> host(4 * n_head);
        dev.get(host.data(), counts, host.size() * sizeof(int));
        count = host.data();
        for (const layer_jobs & l : layers) {
            for (int32_t i : l.jobs) {
                task.results[i] = { count[N_GONE_MERGED], count[N_GONE_DROPPED] };
                count += 4;
            }
        }
    }

private:
    struct layer_jobs {
        explicit layer_jobs(const pass_args * a) : a(a), jobs(a->n_head_kv) {}
        const pass_args * a;
        std::vector<int32_t> jobs; // [n_head_kv]
    };

    template <typename T> void put(device_memory & memory, const T *& to, const T * from, int64_t n) {
        T * p = memory.take<T>(n);
        if (n > 0) {
            dev.put(p, from, n * sizeof(T));
        }
        to = p;
    }

    int32_t n_cand(const pass_job & j) const { return j.n_used - plan.n_row_sink + plan.n_new; }

    // memory: a copy, so that layers share what is left of it.
    void run_layer(const layer_jobs & l, pass_data x, device_memory memory, int * counts) {
        const pass_args & a = *l.a;
        x.k = a.k;
        x.v = a.v;
        x.bias = (sc_half *) a.bias;
        x.s_use = (sc_half *) a.s_use;
        x.heads = (sc_half *) a.heads;
        x.origin = a.origin;
        x.rows = a.row_count - a.n_head_kv; // with the first rows before it
        x.k_stage = a.k_stage;
        x.v_stage = a.v_stage;
        x.q = a.q;
        x.vote_p4 = a.vote_p4;
        x.vote_p = a.vote_p;
        put(memory, x.turn, a.turn, (int64_t) plan.n_voter * a.n_rot);
        put(memory, x.back, a.back, a.makes_frame ? (int64_t) plan.n_token() * a.n_rot : 0);
        put(memory, x.mean_turn, a.mean_turn, a.makes_frame ? a.n_rot : 0);
        put(memory, x.q_weight, a.q_weight, a.q_weight ? (int64_t) a.n_q_layer * a.shape.n_embd_head_k : 0);

        pass_dims m = device_dims(a, plan);
        m.ld = m.n_merged = 0;
        for (int32_t i : l.jobs) {
            const pass_job & j = task.jobs[i];
            const int32_t n_rows = j.n_used + plan.n_token();
            const int32_t n_loser = std::max(0, n_cand(j) - (j.n_alloc - plan.n_row_sink - plan.n_sink));
            m.ld = std::max(m.ld, n_rows);
            m.n_merged = std::max(m.n_merged, pass_n_merged(n_rows, n_loser));
        }
        m.n_head_work = 1;
        m.n_head_work = (int) std::clamp<int64_t>(memory.n_rest() / pass_work_size(m), 1, m.n_head_kv);
        while (m.n_head_work > 1 && pass_work_size(m) > memory.n_rest()) { // each part is aligned
            --m.n_head_work;
        }
        pass_work w;
        pass_work_at(m, memory.rest(), w);
        for (int first = 0; first < m.n_head_kv; first += m.n_head_work) {
            const int n = std::min(m.n_head_work, m.n_head_kv - first);
            m.first_head = first;
            w.n = counts + 4 * first;
            int n_rows = 0, most = 0;
            for (int h = first; h < first + n; ++h) {
                const pass_job & j = task.jobs[l.jobs[h]];
                n_rows = std::max(n_rows, j.n_used + plan.n_token());
                most = std::max(most, n_cand(j));
            }
            pass_steps(m, n_rows, most, [&](auto step, int n_piece, int shared) {
                dev.template pass_step<decltype(step)::value>(n_piece, n, shared, m, x, w);
            });
        }
    }

    D & dev;
    const pass_task & task;
    const pass_plan & plan;
    std::vector<layer_jobs> layers;
    int64_t n_head = 0;
};

} // namespace semcache
