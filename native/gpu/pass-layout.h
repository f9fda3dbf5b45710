// pass-layout.h - what lies where in the memory that a device's pass works in: for who fills it (native/hooks) and who
// launches kernels over it
//
// From its begin, each aligned: the counts that the pass hands back, the plan's arrays, the tables of the layers, those
// of the same RoPE once, and behind them the work of as many heads of a layer as fit.

#pragma once

#include "pass-dims.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace semcache {

class pass_layout {
public:
    // Offsets in bytes.
    struct layer {
        const pass_args * a;
        std::vector<int32_t> jobs; // [n_head_kv] of the task
        int64_t counts;            // I32 [4, n_head_kv] see N_MERGED
        int64_t turn, back, mean_turn, q_weight;
        int64_t params; // pass_dims and, I32, the word where each part of the work begins, for kernels that are told so
        pass_dims m;    // of all heads; first_head: 0
    };

    explicit pass_layout(const pass_task & task) {
        for (int32_t i = 0; i < task.n_job; ++i) {
            const pass_job & j = task.jobs[i];
            auto l = std::find_if(layers.begin(), layers.end(), [&](const layer & l) { return l.a == j.layer; });
            if (l == layers.end()) {
                l = layers.insert(l, { j.layer, std::vector<int32_t>(j.layer->n_head_kv), n_bytes, 0, 0, 0, 0, 0, {} });
                n_bytes += (int64_t) sizeof(int32_t) * 4 * j.layer->n_head_kv;
            }
            l->jobs[j.ih] = i;
        }
        n_bytes = device_size<uint8_t>(n_bytes);
        n_counts = n_bytes;

        const pass_plan & p = *task.plan;
        cell = put(p.cell, p.n_token());
        n_voted = put(p.n_voted, p.n_token());
        chunk = put(p.chunk, p.n_new);
        voter_row = put(p.voter_row, p.n_voter);
        for (layer & l : layers) {
            const pass_args & a = *l.a;
            l.turn = put(a.turn, (int64_t) p.n_voter * a.n_rot);
            l.back = put(a.back, a.makes_frame ? (int64_t) p.n_token() * a.n_rot : 0);
            l.mean_turn = put(a.mean_turn, a.makes_frame ? a.n_rot : 0);
            l.q_weight = put(a.q_weight, a.q_weight ? (int64_t) a.n_q_layer * a.shape.n_embd_head_k : 0);
            l.params = n_bytes;
            n_bytes += DEVICE_PARAMS_SIZE;
        }
        for (layer & l : layers) {
            l.m = dims_of(l, task);
        }
    }

    std::vector<layer> layers;
    int64_t cell, n_voted, chunk, voter_row;

    int64_t size() const { return n_bytes; } // what is behind it is work

    // Bytes of memory without which there is no pass, one head after the other.
    int64_t least_work() const {
        int64_t n = 0;
        for (const layer & l : layers) {
            pass_dims m = l.m;
            m.n_head_work = 1;
            n = std::max<int64_t>(n, pass_work_size(m));
        }
        return n_bytes + n;
    }

    // What has to be in the memory from its begin on when the first kernel runs: zeros where counts will be.
    std::vector<uint8_t> upload() const {
        std::vector<uint8_t> bytes(n_bytes);
        for (const piece & x : pieces) {
            memcpy(bytes.data() + x.at, x.from, x.n);
        }
        for (const layer & l : layers) {
            std::vector<int32_t> parts;
            sc_i64 at = n_bytes;
#define FIELD(type, name, n)             \
    parts.push_back((int32_t) (at / 4)); \
    at = pass_work_behind<type>(l.m, at, (n));
            const pass_dims & m = l.m;
            SC_PASS_WORK(FIELD)
#undef FIELD
            memcpy(bytes.data() + l.params, &m, sizeof(m));
            memcpy(bytes.data() + l.params + sizeof(m), parts.data(), parts.size() * sizeof(int32_t));
        }
        return bytes;
    }

    // The counts, once the last kernel has run: so many bytes from the memory's begin on.
    int64_t counts_size() const { return n_counts; }
    // False if they are not those of a pass: a device need not say that it did not run.
    bool read_counts(const std::vector<uint8_t> & bytes, const pass_task & task) const {
        bool ran = true;
        for (const layer & l : layers) {
            for (size_t ih = 0; ih < l.jobs.size(); ++ih) {
                int32_t n[4];
                memcpy(n, bytes.data() + l.counts + ih * sizeof(n), sizeof(n));
                const pass_job & j = task.jobs[l.jobs[ih]];
                ran = ran && n[N_KEPT] + n[N_GONE_MERGED] + n[N_GONE_DROPPED] == n_cand(j, *task.plan);
                task.results[l.jobs[ih]] = { n[N_GONE_MERGED], n[N_GONE_DROPPED] };
            }
        }
        return ran;
    }

    // Rows of a head while a pass runs, and those of them that may be merged.
    static int32_t n_rows(const pass_job & j, const pass_plan & p) { return j.n_used + p.n_token(); }
    static int32_t n_cand(const pass_job & j, const pass_plan & p) { return j.n_used - p.n_row_sink + p.n_new; }

private:
    pass_dims dims_of(const layer & l, const pass_task & task) const {
        const pass_plan & p = *task.plan;
        pass_dims m = device_dims(*l.a, p);
        m.ld = m.n_merged = m.first_head = 0;
        for (int32_t i : l.jobs) {
            const pass_job & j = task.jobs[i];
            const int32_t n_loser = std::max(0, n_cand(j, p) - (j.n_alloc - p.n_row_sink - p.n_sink));
            m.ld = std::max(m.ld, n_rows(j, p));
            m.n_merged = std::max(m.n_merged, pass_n_merged(n_rows(j, p), n_loser));
        }
        const int64_t n_rest = task.n_work - n_bytes;
        m.n_head_work = 1;
        m.n_head_work = (int) std::clamp<int64_t>(n_rest / pass_work_size(m), 1, m.n_head_kv);
        while (m.n_head_work > 1 && pass_work_size(m) > n_rest) { // each part is aligned
            --m.n_head_work;
        }
        return m;
    }

    struct piece {
        const void * from;
        int64_t n, at;
    };

    template <typename T> int64_t put(const T * from, int64_t n) {
        const int64_t size = (int64_t) sizeof(T) * n;
        const auto same =
            std::find_if(pieces.begin(), pieces.end(), [&](const piece & x) { return x.from == from && x.n == size; });
        if (same != pieces.end()) {
            return same->at;
        }
        const int64_t at = n_bytes;
        if (size > 0) {
            pieces.push_back({ from, size, at });
            n_bytes += device_size<T>(n);
        }
        return at;
    }

    std::vector<piece> pieces;
    int64_t n_bytes = 0, n_counts;
};

} // namespace semcache
