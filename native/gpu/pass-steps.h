// pass-steps.h - the kernels of a pass by their names, what a block of each shares, and in which order they run

#pragma once

#include "pass-work.h"

#define SC_ROWS 16   // of a piece where rows are loaded or stored
#define SC_QUERIES 8 // heads of a group that are in shared memory at once
#define SC_GEMM 64   // a product's tiles are as high and as wide
#define SC_GEMM_K 16
#define SC_GEMM_LD (SC_GEMM + 4)
#define SC_GEMM_SHARED (2 * 4 * SC_GEMM_K * SC_GEMM_LD)

enum {
    PASS_LOAD,
    PASS_FRAME,
    PASS_QUERIES,
    PASS_LOGITS,
    PASS_SHARES,
    PASS_SCORE,
    PASS_OUTPUT,
    PASS_DISTANCES,
    PASS_CHOOSE,
    PASS_METRIC,
    PASS_KEY_METRIC,
    PASS_ASSIGN,
    PASS_COUNT,
    PASS_MERGE,
    PASS_MASS,
    PASS_GONE,
    PASS_MERGED_LOGITS,
    PASS_FIT_BIAS,
    PASS_EQUATIONS,
    PASS_MISSING,
    PASS_NORMAL,
    PASS_MOVE,
    PASS_SOLVE,
    PASS_STORE_SINKS,
    PASS_STORE,
    PASS_REPLACE,
    PASS_SET_COUNTS,
    N_PASS_STEP,
};

// Pieces of a product.
SC_BOTH int sc_gemm_tiles(int n_m, int n_n) {
    return ((n_m + SC_GEMM - 1) / SC_GEMM) * ((n_n + SC_GEMM - 1) / SC_GEMM);
}

SC_BOTH int pass_load_shared(SC_CONST const pass_dims & m) {
    return 4 * (SC_ROWS * (m.d_k > m.d_v ? m.d_k : m.d_v) + 2 * SC_ROWS + 16);
}

SC_BOTH int pass_queries_shared(SC_CONST const pass_dims & m) { return 4 * (SC_QUERIES * m.d_k + 16 + SC_QUERIES); }

SC_BOTH int pass_frame_shared(SC_CONST const pass_dims & m) {
    return 4 * ((SC_QUERIES + 3) * m.d_k + 16 + SC_QUERIES + SC_THREADS);
}

SC_BOTH int pass_distances_shared(SC_CONST const pass_dims & m) {
    return 4 * (SC_THREADS + (m.d_k > m.d_v ? m.d_k : m.d_v));
}

#if !defined(__METAL_VERSION__)

// Calls launch(step as a constant, pieces, bytes of shared memory) for all that a pass needs; n_rows and n_cand: of the
// largest head. For a method that is ours.
template <int STEP> struct pass_step_id {
    static constexpr int value = STEP;
};

template <typename L> void pass_steps(const pass_dims & m, int n_rows, int n_cand, L && launch_some) {
    auto launch = [&](auto step, int n_piece, int shared) {
        if (n_piece > 0) { // there may be no candidates, or none that merge
            launch_some(step, n_piece, shared);
        }
    };
    const int n_query = pass_n_query(m), n_fit = pass_n_fit(m), words = 4 * SC_THREADS;
    auto pieces = [](int n, int of) { return (n + of - 1) / of; };
    launch(pass_step_id<PASS_LOAD>(), pieces(n_rows, SC_ROWS), pass_load_shared(m));
    if (m.makes_frame) {
        launch(pass_step_id<PASS_FRAME>(), 1, pass_frame_shared(m));
    }
    if (n_query > 0) {
        launch(pass_step_id<PASS_QUERIES>(), m.n_voter, pass_queries_shared(m));
        launch(pass_step_id<PASS_LOGITS>(), sc_gemm_tiles(n_query, n_rows), SC_GEMM_SHARED);
        launch(pass_step_id<PASS_SHARES>(), n_query, words);
    }
    launch(pass_step_id<PASS_SCORE>(), pieces(n_rows, SC_THREADS), 0);
    if (n_query > 0) {
        launch(pass_step_id<PASS_OUTPUT>(), m.d_v, words);
    }
    launch(pass_step_id<PASS_DISTANCES>(), 1, pass_distances_shared(m));
    launch(pass_step_id<PASS_CHOOSE>(), 1, words);
    launch(pass_step_id<PASS_METRIC>(), sc_gemm_tiles(m.d_k, m.d_k), SC_GEMM_SHARED);
    launch(pass_step_id<PASS_KEY_METRIC>(), sc_gemm_tiles(n_cand, m.d_k), SC_GEMM_SHARED);
    launch(pass_step_id<PASS_ASSIGN>(), pieces(n_cand, SC_THREADS / SC_WARP), 0);
    launch(pass_step_id<PASS_COUNT>(), 1, words);
    launch(pass_step_id<PASS_MERGE>(), m.n_merged, 0);
    if (n_query > 0) {
        launch(pass_step_id<PASS_MASS>(), n_fit, words);
        launch(pass_step_id<PASS_GONE>(), sc_gemm_tiles(n_fit, m.d_v), SC_GEMM_SHARED);
        launch(pass_step_id<PASS_MERGED_LOGITS>(), sc_gemm_tiles(n_fit, m.n_merged), SC_GEMM_SHARED);
        launch(pass_step_id<PASS_FIT_BIAS>(), pieces(m.n_merged, SC_THREADS), 0);
        launch(pass_step_id<PASS_EQUATIONS>(), n_fit, words);
        launch(pass_step_id<PASS_MISSING>(), sc_gemm_tiles(n_fit, m.d_v), SC_GEMM_SHARED);
        launch(pass_step_id<PASS_NORMAL>(), sc_gemm_tiles(m.n_merged, m.n_merged), SC_GEMM_SHARED);
        launch(pass_step_id<PASS_MOVE>(), sc_gemm_tiles(m.n_merged, m.d_v), SC_GEMM_SHARED);
        launch(pass_step_id<PASS_SOLVE>(), 1, words);
    }
    launch(pass_step_id<PASS_STORE_SINKS>(), 1, pass_load_shared(m));
    launch(pass_step_id<PASS_STORE>(), pieces(n_cand, SC_ROWS), pass_load_shared(m));
    launch(pass_step_id<PASS_REPLACE>(), pieces(n_cand, SC_THREADS), 0);
    launch(pass_step_id<PASS_SET_COUNTS>(), 1, 0);
}

#endif
