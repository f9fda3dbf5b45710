// merge.h - phase 4: clusters become rows

#pragma once

#include "choose.h"

namespace semcache {

// Rows that stand for a cluster of at least two members, in the order of their winners.
struct pass_merged {
    int32_t n; // merged rows
    // [n_cand] members of a winner's cluster, 0 of others
    int32_t * count;
    int32_t * place; // [n_cand] merged row of a winner of such a cluster
    int32_t * first; // [n] winner
    float * k;       // [n, n_embd_head_k], up to whole panels
    float * v;       // [n, value_stride]
    float * bias;    // [n], up to whole panels

    pass_merged(arena & a, const head_shape & shape, const pass_sizes & n);
};

// Means of the clusters weighted by pass_scores::w; adds up the winners' tokens. The biases are log n_tok.
void merge(const pass_head & h, const pass_rows & x, const pass_scores & s, pass_choice & c, pass_merged & m);

// For no more candidates than the budget: all stay.
void keep_all(const pass_head & h, pass_choice & c, pass_merged & m);

} // namespace semcache
