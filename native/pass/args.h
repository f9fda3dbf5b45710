// args.h - what a pass is told: plain data, the same for every backend
//
// A pass over one kv head moves the stage, without its window, into the cores. The specification is
// python/llama_semanticache/reference; the tests hold this code to it.

#pragma once

#include "sc-types.h"

#include <array>
#include <cstdint>

struct ggml_tensor;

namespace semcache {

// Of the tokens since the last pass, beginning with the first, every VOTE_EVERY-th has queries that vote.
constexpr int32_t VOTE_EVERY = 2;
// Percent of a head's rows that go to the keys least like the others, whatever their score.
constexpr int32_t DISTINCT = 50;
// Rows are merged by this many queries of a head at the most, or those of one token more: distances, biases and values.
constexpr int32_t N_FIT = 320;

// Of the tokens that vote, every so many-th has queries that rows are merged by.
constexpr int32_t fit_stride(int32_t n_voter, int32_t n_gqa) {
    return n_voter > 0 ? (n_voter * n_gqa + N_FIT - 1) / N_FIT : 1;
}

struct head_shape {
    int32_t n_embd_head_k;
    int32_t n_embd_head_v;
    int32_t n_gqa; // query heads of a kv head, of all layers that read its rows
    float scale;   // of the logits
    float softcap; // 0: none
};

// What is the same for all layers and heads.
//
// The stage's tokens are in position order: n_sink new sinks (first pass only), n_new candidates, n_window that stay.
struct pass_plan {
    method how;
    bool merge;       // false: losers are dropped
    int32_t distinct; // percent, see DISTINCT

    int32_t n_row_sink; // rows of each head, the first, that are sinks already
    int32_t n_sink, n_new, n_window;
    const int32_t * cell;    // [n_token] cell of each token
    const int32_t * chunk;   // [n_new] chunk id
    const int32_t * n_voted; // [n_token] tokens whose queries voted on it in earlier passes; of 0 no votes are read

    int32_t n_voter; // tokens whose queries vote now
    int32_t n_full;  // of a pass that is as far from the last as it can be; a core's score is a mean over no fewer
    const int32_t * voter_row;   // [n_voter] row of the query ring
    const int32_t * voter_token; // [n_voter] place in the stage, ascending; read by the methods of others only

    int32_t n_token() const { return n_sink + n_new + n_window; }
};

// What pointers of pass_args point into.
enum pass_tensor {
    PASS_TENSOR_K,
    PASS_TENSOR_V,
    PASS_TENSOR_BIAS,
    PASS_TENSOR_S_USE,
    PASS_TENSOR_HEADS,
    PASS_TENSOR_ORIGIN,
    PASS_TENSOR_ROWS,
    PASS_TENSOR_K_STAGE,
    PASS_TENSOR_V_STAGE,
    PASS_TENSOR_Q,
    PASS_TENSOR_VOTE_P4,
    PASS_TENSOR_VOTE_P,
    N_PASS_TENSOR,
};

// One layer. Pointers of rows, stage and ring are to all heads; strides are in elements, those of the stage in bytes.
struct pass_args {
    head_shape shape;
    int32_t n_head_kv;

    // Rows of head ih: row_first[ih] and those behind it. plan::n_row_sink sinks, then cores in text order, then free
    // ones. K and V of sinks are in heads; nothing of their rows is read.
    uint8_t * k; // [n_row] rows of n_embd_head_k values of type k_type
    uint8_t * v; // [n_row] rows of n_embd_head_v values of type v_type
    row_type k_type, v_type;
    f16 * bias;       // [n_row]
    f16 * s_use;      // [n_row] greatest attention that a core ever got
    float * s_policy; // [n_row] instead of it, of the methods that evict: the last pass's score, which some add up
    int32_t * origin; // [n_row] chunk and tokens, see origin_of; clusters never cross a chunk, of at most 255 tokens
    int32_t n_row;    // allocated
    const int32_t * row_first; // [n_head_kv]
    int32_t * row_count;       // [n_head_kv] in use; written by the pass
    f16 * heads;               // [n_head_kv, head_size] see head_parts; frames and sinks are written by the first pass
    int32_t n_sink;            // that heads has room for

    // Stage, by cells, of type f16 or q8_0. If k_rotated, its keys, those of the sinks and the ring's queries are
    // rotated.
    bool k_rotated;
    const uint8_t * k_stage;
    row_type k_cell_type;
    int64_t k_head, k_cell; // a key is contiguous
    const uint8_t * v_stage;
    row_type v_cell_type;
    int64_t v_head, v_cell, v_elem; // a value of f16 need not be (transposed cache)
    bool v_trans() const { return v_elem > (int64_t) sizeof(f16); }
    float * vote_p4; // [n_head_kv, vote_head] sums over queries and query heads: of attention shares to the power of 4
    float * vote_p;  // likewise: of attention shares
    int64_t vote_head;

    // Query ring. A row holds the queries of all heads, layer by layer.
    const uint8_t * q;
    row_type q_type;        // f16 where heads do not fill blocks
    int64_t q_row;          // bytes from one row to the next
    int32_t n_q_layer;      // layers whose queries ask: the one that has the rows, and those that read them
    const float * q_weight; // [n_q_layer, n_embd_head_k] that queries were multiplied by after RoPE; NULL: by nothing

    // Turns of the voters' queries, see rope::table.
    const float * turn; // [n_voter, n_rot/2, 2]
    int32_t n_rot;      // 0: none
    bool neox;

    // Whether this pass makes frames, as the first over a text does: with turns of the stage's tokens back to position
    // 0 [n_token, n_rot/2, 2] and the mean of the turns to all positions of the context [n_rot/2, 2].
    bool makes_frame;
    const float *back, *mean_turn;

    // For backends whose memory has no addresses; never followed by others.
    std::array<const ggml_tensor *, N_PASS_TENSOR> tensors;
};

// Counts over the candidates of a head.
struct pass_result {
    int32_t n_merged = 0;
    int32_t n_dropped = 0;
};

} // namespace semcache
