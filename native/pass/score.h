// score.h - phase 2: what every row is worth to the queries

#pragma once

#include "load.h"

namespace semcache {

// By candidate, as the reference's score(); the tail of s_use and w is scratch. Read by choose, merge and fit.
struct pass_scores {
    float * s_use; // [n_cols] power mean of the attention shares
    float * w;     // [n_cols] their mean: the weight of a row in a merge
    float * s_dev; // [n_cand] distance of the value from the mean value, in units of the mean distance

    float * z;   // [n_query] log-sum-exp of each query row
    float * out; // [value_stride] mean output of those that merged rows are fitted to

    pass_scores(arena & a, const head_shape & shape, const pass_sizes & n);
};

struct score_scratch {
    float * panels; // [n_cols, n_embd_head_k] packed keys
    float * bias;   // [n_cols]
    float * x;      // a block of logits
    float * v_mean; // [n_embd_head_v]

    score_scratch(arena & a, const head_shape & shape, const pass_sizes & n);
};

// Scores all candidates and adds to the votes of the stage. outputs: `out` is wanted as well.
void score_rows(const pass_head & h, const pass_rows & x, bool outputs, pass_scores & s, score_scratch & t);

} // namespace semcache
