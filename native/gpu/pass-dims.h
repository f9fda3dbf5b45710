// pass-dims.h - what a device is told of a pass, from what the host knows, and the memory that it takes there

#pragma once

#include "pass-work.h"
#include "pass/task.h"

#include <algorithm>

namespace semcache {

// Heads are worked on at once as long as they take no more than this; one is, whatever it takes. Not tuned: no card was
// at hand.
constexpr int64_t DEVICE_WORK = 64 << 20;

// All but ld, n_merged, first_head and n_head_work.
inline pass_dims device_dims(const pass_args & a, const pass_plan & p) {
    pass_dims m = {};
    m.d_k = a.shape.n_embd_head_k;
    m.d_v = a.shape.n_embd_head_v;
    m.n_gqa = a.shape.n_gqa;
    m.n_head_kv = a.n_head_kv;
    m.scale = a.shape.scale;
    m.softcap = a.shape.softcap;
    m.k_type = (int) a.k_type;
    m.v_type = (int) a.v_type;
    m.k_cell_type = (int) a.k_cell_type;
    m.v_cell_type = (int) a.v_cell_type;
    m.q_type = (int) a.q_type;
    m.k_rotated = a.k_rotated;
    m.n_row = a.n_row;
    m.n_sink_max = a.n_sink;
    m.n_row_sink = p.n_row_sink;
    m.n_sink = p.n_sink;
    m.n_new = p.n_new;
    m.n_window = p.n_window;
    m.n_voter = p.n_voter;
    m.n_full = p.n_full;
    m.stride = fit_stride(p.n_voter, a.shape.n_gqa);
    m.merge = p.merge;
    m.distinct = p.distinct;
    m.makes_frame = a.makes_frame;
    m.n_rot = a.n_rot;
    m.neox = a.neox;
    m.n_q_layer = a.n_q_layer;
    m.has_weight = a.q_weight != nullptr;
    m.k_head = a.k_head;
    m.k_cell = a.k_cell;
    m.v_head = a.v_head;
    m.v_cell = a.v_cell;
    m.v_elem = a.v_elem;
    m.q_row = a.q_row;
    m.vote_head = a.vote_head;
    return m;
}

// Bytes of an array in device memory.
template <typename T> int64_t device_size(int64_t n) {
    return ((int64_t) sizeof(T) * n + SC_PASS_ALIGNMENT - 1) & -SC_PASS_ALIGNMENT;
}

// Bytes of what pass_layout says of a layer's work.
#define FIELD(type, name, n) +1
constexpr int64_t DEVICE_PARAMS_SIZE =
    ((int64_t) sizeof(pass_dims) + 4 * (0 SC_PASS_WORK(FIELD)) + SC_PASS_ALIGNMENT - 1) & -SC_PASS_ALIGNMENT;
#undef FIELD

// Bytes of a pass's plan, and of the tables of a RoPE; of a pass that makes frames, which has the most.
inline int64_t device_plan_size(int32_t n_token, int32_t n_voter) {
    return 3 * device_size<int32_t>(n_token) + device_size<int32_t>(n_voter);
}
inline int64_t device_table_size(int32_t n_token, int32_t n_voter, int32_t n_rot) {
    return device_size<float>((int64_t) n_voter * n_rot) + device_size<float>((int64_t) n_token * n_rot) +
           device_size<float>(n_rot);
}

// Bytes of the work of the largest pass over a head, in which n_alloc rows are in use, there are n_token tokens in the
// stage, n_leave of which leave it, and n_voter vote. m: without n_head_work, which is set to 1.
inline int64_t device_head_size(
    pass_dims & m, const pass_args & a, int32_t n_alloc, int32_t n_token, int32_t n_leave, int32_t n_voter) {
    pass_plan p = {};
    p.n_new = n_token;
    p.n_voter = n_voter;
    m = device_dims(a, p);
    const int n_fit = std::min(n_voter, N_FIT / m.n_gqa + 1); // fewer voters may have more that are fitted to
    m.stride = std::max(1, n_voter / std::max(1, n_fit));
    m.ld = n_alloc + n_token;
    m.n_merged = pass_n_merged(m.ld, n_leave);
    m.n_head_work = 1;
    return pass_work_size(m);
}

// The same of a layer, whose largest head it is.
inline int64_t device_work_size(
    const pass_args & a, int32_t n_alloc, int32_t n_token, int32_t n_leave, int32_t n_voter) {
    pass_dims m;
    const int64_t one = device_head_size(m, a, n_alloc, n_token, n_leave, n_voter);
    m.n_head_work = (int) std::clamp<int64_t>(DEVICE_WORK / one, 1, m.n_head_kv);
    return pass_work_size(m);
}

// No layer has a larger one whose heads have up to n_alloc rows.
inline int64_t device_work_bound(
    const pass_args & a, int32_t n_alloc, int32_t n_token, int32_t n_leave, int32_t n_voter) {
    pass_dims m;
    const int64_t one = device_head_size(m, a, n_alloc, n_token, n_leave, n_voter);
    return std::max(one, std::min(DEVICE_WORK, a.n_head_kv * one));
}

} // namespace semcache
