// shim-device.h - a device as native/gpu/run-pass.h and run-attn.h want it: the CPU, a fiber per thread

#pragma once

#include "gpu/pass-layout.h"
#include "gpu/pass.h"
#include "sc-test.h"

#include <cstring>
#include <vector>

namespace sc_test {

class shim_device {
public:
    // only_head: the only one whose blocks are run; -1: all. in_one_piece: else each part of a pass's work has memory
    // of its own, to the byte.
    explicit shim_device(int only_head = -1, bool in_one_piece = true) :
        only_head(only_head), in_one_piece(in_one_piece) {}

    template <int STEP>
    void pass_step(int n_piece, int n_head, int shared, const pass_dims & m, const semcache::pass_layout::layer &,
        const pass_data & x, const pass_work & given) {
        CHECK(n_piece > 0 && n_head > 0); // a device refuses an empty grid
        if (STEP == PASS_LOAD && !in_one_piece) {
            parts.clear();
#define FIELD(type, name, n)                                      \
    parts.emplace_back(sizeof(type) * m.n_head_work * (n), 0xff); \
    own.name = (type *) parts.back().data();
            SC_PASS_WORK(FIELD)
#undef FIELD
            own.n = given.n;
        }
        const pass_work & w = in_one_piece ? given : own;
        for (int h = 0; h < n_head; ++h) {
            if (only_head >= 0 && m.first_head + h != only_head) {
                continue;
            }
            sc_cpu::launch(n_piece, 1, SC_THREADS, shared, [&](const sc_tid & t, uchar * sh) {
                sc_tid of_head = t;
                of_head.y = h;
                ::pass_step<STEP>(of_head, m, x, w, sh);
            });
        }
    }

private:
    const int only_head;
    const bool in_one_piece;
    std::vector<std::vector<uint8_t>> parts;
    pass_work own = {};
};

} // namespace sc_test
