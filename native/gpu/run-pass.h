// run-pass.h - launches the kernels of a pass, the same for all devices
//
// A device D runs in order what it is told, over memory that pass_layout::upload() lies in:
//
//     pass_step<STEP>(n_piece, n_head, shared, m, l, x, w)    launches a kernel of pass.h, see pass_steps(), for layer
//     l
//
// x and w are pointers into the tensors' memory, from the address that it says that it has.

#pragma once

#include "pass-layout.h"
#include "pass-steps.h"

#include <algorithm>

namespace semcache {

template <typename D> class device_pass {
public:
    device_pass(D & dev, const pass_task & task) : dev(dev), task(task), at(task) {}

    void run() {
        for (const pass_layout::layer & l : at.layers) {
            run_layer(l);
        }
    }

private:
    template <typename T> T * memory(int64_t offset) const { return (T *) (task.work + offset); }

    pass_data data_of(const pass_layout::layer & l) const {
        const pass_args & a = *l.a;
        pass_data x = {};
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
        x.q_weight = memory<const float>(l.q_weight);
        x.turn = memory<const float>(l.turn);
        x.back = memory<const float>(l.back);
        x.mean_turn = memory<const float>(l.mean_turn);
        x.cell = memory<const int>(at.cell);
        x.chunk = memory<const int>(at.chunk);
        x.n_voted = memory<const int>(at.n_voted);
        x.voter_row = memory<const int>(at.voter_row);
        return x;
    }

    void run_layer(const pass_layout::layer & l) {
        const pass_data x = data_of(l);
        pass_dims m = l.m;
        pass_work w;
        pass_work_at(m, memory<uint8_t>(at.size()), w);
        for (int first = 0; first < m.n_head_kv; first += m.n_head_work) {
            const int n = std::min(m.n_head_work, m.n_head_kv - first);
            m.first_head = first;
            w.n = memory<int>(l.counts) + 4 * first;
            int n_rows = 0, most = 0;
            for (int h = first; h < first + n; ++h) {
                const pass_job & j = task.jobs[l.jobs[h]];
                n_rows = std::max(n_rows, at.n_rows(j, *task.plan));
                most = std::max(most, at.n_cand(j, *task.plan));
            }
            pass_steps(m, n_rows, most, [&](auto step, int n_piece, int shared) {
                dev.template pass_step<decltype(step)::value>(n_piece, n, shared, m, l, x, w);
            });
        }
    }

    D & dev;
    const pass_task & task;
    const pass_layout at;
};

} // namespace semcache
