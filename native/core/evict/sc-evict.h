// sc-evict.h - what other methods keep: eviction policies to compare with
//
// A policy scores every row, and the best candidates stay as they are; nothing is merged, and every head has the same
// budget. One policy per file. The specification is python/llama_semanticache/reference/evict.py.

#pragma once

#include "sc-types.h"

namespace semcache {

struct evict_input {
    int32_t n_cand; // rows that may go: those of earlier passes, then tokens; before all others, in text order
    int32_t n_row;
    int32_t n_embd_head_k;
    const float * k;           // [n_row, n_embd_head_k]
    const float * s_old;       // [n_row] score that the last pass gave, 0 of a row that it did not see
    const int32_t * row_token; // [n_row] place in the stage; -1: a row of earlier passes

    int32_t n_voter, n_gqa;
    float softcap;
    const float * q; // [n_voter, n_gqa, n_embd_head_k], at their own positions, with the scale of the logits in them
    const int32_t * voter_token; // [n_voter] place in the stage, ascending

    int32_t n_query() const { return n_voter * n_gqa; }

    // Adds the attention shares of one query to score [n_row]; 0 of the tokens behind it. p [n_row] is scratch.
    void add_shares(int32_t query, float * p, float * score) const;
};

// The newest candidates that a policy keeps whatever their scores, of `budget` that stay. H2O keeps as many of the
// newest as of the heaviest rows; the window, which no pass touches, belongs to the newest.
inline int32_t newest_kept(method how, int32_t budget, int32_t n_window) {
    return how == method::h2o && budget > n_window ? (budget - n_window) / 2 : 0;
}

// Writes score [n_row]; p is scratch for max(n_row, n_embd_head_k) values. Nothing is allocated.
void evict_scores(method how, const evict_input & x, float * p, float * score); // by the policy of that method
void evict_keydiff(const evict_input & x, float * p, float * score);
void evict_knorm(const evict_input & x, float * p, float * score);
void evict_snapkv(const evict_input & x, float * p, float * score);
void evict_tova(const evict_input & x, float * p, float * score);
void evict_h2o(const evict_input & x, float * p, float * score);

} // namespace semcache
