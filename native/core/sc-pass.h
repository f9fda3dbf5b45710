// sc-pass.h - one pass over one kv head: the stage, without its window, moves into the cores
//
// The specification is python/llama_semanticache/reference; the tests hold this code to it. Nothing here allocates once
// pass_workspace::reserve() has returned, so a pass that begins to write also ends.

#pragma once

#include "sc-lookahead.h"
#include "sc-types.h"

#include <cstdint>
#include <vector>

namespace semcache {

constexpr int32_t VOTE_EVERY =
    2; // of the tokens since the last pass, beginning with the first, every so many'th has queries that vote
constexpr int32_t DISTINCT =
    50; // percent of a head's rows that go to the keys least like the others, whatever their score
constexpr int32_t N_FIT = 96; // rows are merged by the queries of about so many tokens: distances, biases and values

enum class method { semantic = 0, paper = 1, streaming = 2, keydiff = 3, knorm = 4, snapkv = 5, tova = 6, h2o = 7 };

constexpr bool evicts(method m) { return m >= method::keydiff; } // by a policy of evict/

constexpr bool asks_queries(method m) {
    return m == method::semantic || m == method::snapkv || m == method::tova || m == method::h2o;
}

// What a pass remembers of a core besides its row.
struct core_meta {
    float s_use; // how much attention it got: see Scores of the reference; the greatest of all passes, of those who
                 // evict the last one's
    uint32_t chunk : 24; // id of its chunk
    uint32_t n_tok : 8;  // tokens that it stands for; at most n_chunk <= 255, since clusters never cross a chunk
};
static_assert(sizeof(core_meta) == 8, "two words per row");

// The rows of one kv head: n_sink sinks, then cores in text order, then free rows.
struct head_rows {
    uint8_t * k;      // [n_alloc] rows of n_embd_head_k values of type k_type
    uint8_t * v;      // [n_alloc] rows of n_embd_head_v values of type v_type
    float * bias;     // [n_alloc]
    core_meta * meta; // [n_alloc]
    int32_t n_alloc;
    int32_t n_sink; // of the rows in use; never merged or dropped
    int32_t n_used;
    row_type k_type, v_type;
};

// What the queries of earlier passes said of a token that was in the stage by then: sums over queries and query heads.
struct token_votes {
    float p4; // of its attention share to the power of 4
    float p;  // of its attention share
};

// The stage as one kv head sees it. Tokens are in position order: n_sink new sinks (first pass only), n_new candidates,
// n_window that stay. k, v and votes point at cell 0; cell[i] is the cell of token i.
struct stage_rows {
    const f16 * k;
    int64_t k_cell; // elements from one cell to the next; a key is contiguous
    const f16 * v;
    int64_t v_cell;
    int64_t v_elem;        // a value need not be (transposed cache)
    const int32_t * cell;  // [n_sink + n_new + n_window]
    const int32_t * chunk; // [n_new]
    int32_t n_sink;
    int32_t n_new;
    int32_t n_window;

    // Votes of earlier passes, to which this pass adds its own.
    token_votes * votes;     // [n_cell]
    const int32_t * n_voted; // [n_sink + n_new + n_window] tokens whose queries voted; of 0 the votes are not read
};

// The queries that vote in a pass, see VOTE_EVERY.
struct query_rows {
    const f16 * q;
    int64_t q_row;         // [n_gqa, n_embd_head_k] per row, contiguous
    const int32_t * row;   // [n] row of each token's queries
    const float * cs;      // [n, n_rot/2, 2] turn of each token's queries, see rope::table
    const int32_t * token; // [n] place of each token in the stage; read by evict/ only
    int32_t n;             // tokens
    int32_t n_full; // of a pass that is as far from the last as it can be; a core's score is a mean over no fewer

    // In q8_0 instead of q: rows of q8_row blocks, in which this head's group begins at value q8_first.
    const q8_block * q8;
    int64_t q8_row;
    int32_t q8_first;
};

struct head_shape {
    int32_t n_embd_head_k;
    int32_t n_embd_head_v;
    int32_t n_gqa; // query heads of this kv head
    float scale;   // of the logits
    float softcap; // 0: none
};

struct pass_params {
    enum method how = method::semantic;
    bool merge = true; // false: losers are dropped
    int32_t distinct = DISTINCT;
};

struct pass_result {
    int64_t n_merged = 0;
    int64_t n_dropped = 0;
};

// Scratch of one thread.
struct pass_workspace {
    // For heads of up to n_rows candidates, sinks and window together, of which n_loser lose at most (in the semantic
    // method the candidates above the budget), and n_query tokens that vote. Throws std::bad_alloc.
    void reserve(const head_shape & shape, int32_t n_rows, int32_t n_loser, int32_t n_query);

    std::vector<float> k, panels, q, x;                 // keys, packed keys, turned queries, a block of logits
    std::vector<float> bias, s_use, s_dev, s_key, w, z; // per row; z per query
    std::vector<float> m, mk;                  // sum of q q', and its product with keys; mk is other things later
    std::vector<float> k_new, v_new, bias_new; // merged winners
    std::vector<float> v, v_mean, k_mean;      // values, the candidates' mean, and that of their unit keys
    std::vector<float> out;                    // outputs of the queries that merged rows are fitted to
    std::vector<float> v_gone, bias_gone, s_gone, shares, r, normal, move; // see gather_gone, fit_bias and fit_values
    std::vector<int32_t> order, rank, winner, merged, count;
    std::vector<core_meta> meta;
};

// Queries of token t as f32 q [n_gqa, n_embd_head_k], neither turned nor scaled.
void load_query(const query_rows & queries, const head_shape & shape, int32_t t, float * q);

// Value of token t as f32 v [n_embd_head_v].
void load_value(const stage_rows & stage, const head_shape & shape, int32_t t, float * v);

// Scores of the candidates (cores, then new tokens): ws.s_use, ws.s_dev and ws.w [n_cand], as in the reference's
// score(). Adds to the votes of the stage. Leaves keys, turned queries, log-sum-exps and, if asked, the outputs of the
// queries that merged rows are fitted to in the workspace. Returns the number of candidates, c + n.
int32_t score_head(const head_rows & rows, const stage_rows & stage, const query_rows & queries,
    const head_shape & shape, const rope & r, bool outputs, pass_workspace & ws);

// The whole pass of one head, in place. Without candidates it only takes votes.
pass_result compress_head(head_rows & rows, const stage_rows & stage, const query_rows & queries,
    const head_shape & shape, const rope & r, const pass_params & params, pass_workspace & ws);

} // namespace semcache
