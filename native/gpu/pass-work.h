// pass-work.h - what the kernels of a pass are given and what they work in, for device and host

#pragma once

#include "row-size.h"

// Sizes, types and strides: the same for all heads.
struct pass_dims {
    int d_k, d_v, n_gqa, n_head_kv;
    int first_head, n_head_work; // block t.y is head first_head + t.y; the work is that of so many
    float scale, softcap;
    int k_type, v_type, k_cell_type, v_cell_type, q_type, k_rotated;
    int n_row;      // allocated, of all heads
    int n_sink_max; // that `heads` has room for
    int n_row_sink, n_sink, n_new, n_window;
    int n_voter, n_full, stride; // every stride-th voter's queries are fitted to
    int merge, distinct;
    int makes_frame, n_rot, neox, n_q_layer, has_weight;
    int ld, n_merged;                                     // rows and merged rows of a head at the most
    sc_i64 k_head, k_cell, v_head, v_cell, v_elem, q_row; // bytes
    sc_i64 vote_head;
};

// As pass_args and pass_plan.
struct pass_data {
    SC_GLOBAL uchar *k, *v;
    SC_GLOBAL sc_half *bias, *s_use, *heads;
    SC_GLOBAL int *origin, *rows; // rows [2, n_head_kv]: first of each head, in use
    SC_GLOBAL const uchar *k_stage, *v_stage, *q;
    SC_GLOBAL float *vote_p4, *vote_p;
    SC_GLOBAL const float *q_weight, *turn, *back, *mean_turn; // weights: if has_weight
    SC_GLOBAL const int *cell, *chunk, *n_voted, *voter_row;
};

// Work, each of n_head_work heads after the other: FIELD(type, name, values of a head), in dims m.
#define SC_PASS_WORK(FIELD)                                                                    \
    FIELD(float, k, (sc_i64) m.ld * m.d_k)                                                     \
    FIELD(float, v, (sc_i64) m.ld * m.d_v)                                                     \
    FIELD(float, bias, m.ld)                                                                   \
    FIELD(float, q, (sc_i64) pass_n_query(m) * m.d_k) /* the fitted ones first */              \
    FIELD(float, z, pass_n_query(m))                  /* log-sum-exps */                       \
    FIELD(float, p, (sc_i64) pass_n_query(m) * m.ld)  /* shares */                             \
    FIELD(float, w_fit, m.ld)                         /* sums of the fitted queries' shares */ \
    FIELD(float, out, m.d_v)                          /* mean output of the fitted queries */  \
    FIELD(float, s_use, m.ld)                                                                  \
    FIELD(float, w, m.ld)                                                                      \
    FIELD(float, dev, m.ld)        /* of values from their mean */                             \
    FIELD(float, difference, m.ld) /* of keys from the others */                               \
    FIELD(float, metric, m.d_k * m.d_k)                                                        \
    FIELD(float, k_metric, (sc_i64) m.ld * m.d_k)                                              \
    FIELD(int, chunk, m.ld)                                                                    \
    FIELD(int, n_tok, m.ld)                                                                    \
    FIELD(int, stays, m.ld)  /* place among the rows that stay, from 1 on; 0: goes */          \
    FIELD(int, winner, m.ld) /* itself, the row that it joins, or SC_DROPPED */                \
    FIELD(int, count, m.ld)  /* members of a winner */                                         \
    FIELD(int, place, m.ld)  /* among the merged rows */                                       \
    FIELD(int, first, m.n_merged)                                                              \
    FIELD(int, n, 4) /* see N_MERGED */                                                        \
    FIELD(float, mk, (sc_i64) m.n_merged * m.d_k)                                              \
    FIELD(float, mv, (sc_i64) m.n_merged * m.d_v)                                              \
    FIELD(float, m_bias, m.n_merged)                                                           \
    FIELD(float, mass, (sc_i64) pass_n_fit(m) * m.n_merged)                                    \
    FIELD(float, shares, (sc_i64) pass_n_fit(m) * m.n_merged)                                  \
    FIELD(float, share, pass_n_fit(m))                                                         \
    FIELD(float, r, (sc_i64) pass_n_fit(m) * m.d_v)                                            \
    FIELD(float, normal, (sc_i64) m.n_merged * m.n_merged)                                     \
    FIELD(float, move, (sc_i64) m.n_merged * m.d_v)                                            \
    FIELD(uchar, new_k, m.ld * sc_row_size(m.k_type, m.d_k)) /* rows as they will be */        \
    FIELD(uchar, new_v, m.ld * sc_row_size(m.v_type, m.d_v))                                   \
    FIELD(sc_half, new_bias, m.ld)                                                             \
    FIELD(sc_half, new_s_use, m.ld)                                                            \
    FIELD(int, new_origin, m.ld)

struct pass_work {
#define FIELD(type, name, n) SC_GLOBAL type * name;
    SC_PASS_WORK(FIELD)
#undef FIELD
};

SC_BOTH int pass_n_query(SC_CONST const pass_dims & m) { return m.n_voter * m.n_gqa; }
SC_BOTH int pass_n_fit(SC_CONST const pass_dims & m) { return (m.n_voter + m.stride - 1) / m.stride * m.n_gqa; }

// Merged rows of a head at the most: each has two members, one of which is above the budget.
SC_BOTH int pass_n_merged(int n_rows, int n_loser) { return n_loser < n_rows / 2 ? n_loser : n_rows / 2; }

#define SC_PASS_ALIGNMENT 16

// Behind a part at `at`, of n values of a head; aligned.
template <typename T> SC_BOTH sc_i64 pass_work_behind(SC_CONST const pass_dims & m, sc_i64 at, sc_i64 n) {
    return (at + (sc_i64) sizeof(T) * m.n_head_work * n + SC_PASS_ALIGNMENT - 1) & -SC_PASS_ALIGNMENT;
}

// Bytes of all work.
SC_BOTH sc_i64 pass_work_size(SC_CONST const pass_dims & m) {
    sc_i64 at = 0;
#define FIELD(type, name, n) at = pass_work_behind<type>(m, at, n);
    SC_PASS_WORK(FIELD)
#undef FIELD
    return at;
}

// The work in one piece of memory, aligned.
SC_BOTH void pass_work_at(SC_CONST const pass_dims & m, SC_GLOBAL uchar * base, SC_THREAD pass_work & w) {
    sc_i64 at = 0;
#define FIELD(type, name, n)                 \
    w.name = (SC_GLOBAL type *) (base + at); \
    at = pass_work_behind<type>(m, at, n);
    SC_PASS_WORK(FIELD)
#undef FIELD
}

enum { N_MERGED = 0, N_KEPT = 1, N_GONE_MERGED = 2, N_GONE_DROPPED = 3 }; // places in pass_work::n
