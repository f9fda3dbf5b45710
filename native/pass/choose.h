// choose.h - phase 3: who stays, who joins whom, who goes

#pragma once

#include "score.h"

namespace semcache {

constexpr int32_t DROPPED = -1;

// What a pass decides, and what it remembers of its candidates.
struct pass_choice {
    // [n_cand] a candidate's own number if it stays as a row, that of the row that it joins, or DROPPED
    int32_t * winner;
    float * s_use;   // [n_cand] greatest attention so far
    int32_t * chunk; // [n_cand]
    int32_t * n_tok; // [n_cand]

    pass_choice(arena & a, const head_shape & shape, const pass_sizes & n);
};

struct choose_scratch {
    float * score;    // [n_rows] by which winners are chosen
    float * s_key;    // [n_rows] how unlike the others a key is; the paper's norms; scores that policies gave before
    float * k_mean;   // [n_embd_head_k]
    float * p;        // [n_rows] attention shares of one query
    int32_t * order;  // [n_rows]
    int32_t * stays;  // [n_cand] 0 or 1
    float * metric;   // [n_embd_head_k, n_embd_head_k] sum of q q', rows in whole tiles
    float * k_metric; // [n_cand, n_embd_head_k] keys times that, likewise

    choose_scratch(arena & a, const head_shape & shape, const pass_sizes & n);
};

// Chunks, tokens and greatest scores of the candidates.
void remember(const pass_head & h, const pass_scores & s, pass_choice & c);

// Scores of an eviction policy (core/evict) as pass_scores::s_use. The stage's tokens keep theirs as votes.
void score_by_policy(const pass_head & h, const pass_rows & x, pass_scores & s, choose_scratch & t);

// For more candidates than the budget. Also sets pass_scores::w to what each weighs in a merge.
void choose(const pass_head & h, const pass_rows & x, pass_scores & s, pass_choice & c, choose_scratch & t);

// Calls f(begin, end) for every run of candidates with one chunk id.
template <typename F> void for_chunks(int32_t n_cand, const int32_t * chunk, F && f) {
    for (int32_t i = 0, j; i < n_cand; i = j) {
        for (j = i + 1; j < n_cand && chunk[j] == chunk[i]; ++j) {
        }
        f(i, j);
    }
}

// The paper's clustering, see choose_paper.cpp.
void choose_paper(const pass_head & h, const pass_rows & x, pass_choice & c, choose_scratch & t);

} // namespace semcache
