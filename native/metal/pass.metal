// pass.metal - the pass of native/gpu/pass.h as Metal knows it: one kernel a step

#include "gpu/pass.h"

template <int STEP>
kernel void kernel_pass_step(
    constant pass_dims & m [[buffer(0)]],
    device uchar * k [[buffer(1)]],
    device uchar * v [[buffer(2)]],
    device half * bias [[buffer(3)]],
    device half * s_use [[buffer(4)]],
    device half * heads [[buffer(5)]],
    device int * origin [[buffer(6)]],
    device int * rows [[buffer(7)]],
    device const uchar * k_stage [[buffer(8)]],
    device const uchar * v_stage [[buffer(9)]],
    device const uchar * q [[buffer(10)]],
    device float * vote_p4 [[buffer(11)]],
    device float * vote_p [[buffer(12)]],
    device const float * q_weight [[buffer(13)]],
    device const float * turn [[buffer(14)]],
    device const float * back [[buffer(15)]],
    device const float * mean_turn [[buffer(16)]],
    device const int * cell [[buffer(17)]],
    device const int * chunk [[buffer(18)]],
    device const int * n_voted [[buffer(19)]],
    device const int * voter_row [[buffer(20)]],
    device int * counts [[buffer(21)]],
    device uchar * work [[buffer(22)]],
    SC_SHARED uchar * sh [[threadgroup(0)]],
    uint id [[thread_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort warp [[simdgroup_index_in_threadgroup]],
    uint3 tg [[threadgroup_position_in_grid]]) {
    const sc_tid t = { id, lane, warp, tg.x, tg.y };
    const pass_data x = { k, v, bias, s_use, heads, origin, rows, k_stage, v_stage, q, vote_p4, vote_p, q_weight, turn,
        back, mean_turn, cell, chunk, n_voted, voter_row };
    pass_work w;
    pass_work_at(m, work, w);
    w.n = counts;
    pass_step<STEP>(t, m, x, w, sh);
}

#define SC_STEP(STEP) SC_KERNEL(kernel_pass_step_##STEP, kernel_pass_step<STEP>)

SC_STEP(0) SC_STEP(1) SC_STEP(2) SC_STEP(3) SC_STEP(4) SC_STEP(5) SC_STEP(6) SC_STEP(7) SC_STEP(8)
SC_STEP(9) SC_STEP(10) SC_STEP(11) SC_STEP(12) SC_STEP(13) SC_STEP(14) SC_STEP(15) SC_STEP(16) SC_STEP(17)
SC_STEP(18) SC_STEP(19) SC_STEP(20) SC_STEP(21) SC_STEP(22) SC_STEP(23) SC_STEP(24) SC_STEP(25) SC_STEP(26)
