// fit.h - phase 5: merged rows answer the queries as the rows before did

#pragma once

#include "merge.h"

namespace semcache {

struct fit_scratch {
    // Rows that do not stay as they are: the members of clusters, cluster by cluster, then those dropped.
    int32_t * end;  // [n_merged] where the members of a cluster end
    int32_t * gone; // [n_gone] their candidates
    float * panels; // [n_gone, n_embd_head_k] packed keys
    float * v;      // [n_gone, value_stride]
    float * bias;   // [n_gone], up to whole panels

    float * panels_new; // [n_merged, n_embd_head_k] packed keys of the merged rows
    float * x;          // blocks of logits of the gone and the merged rows
    float * mass;       // [n_merged] a query's attention to the members of each cluster
    float * share;      // [n_fit_query] a query's attention to all gone rows
    float * r;          // [n_fit_query, value_stride] their part of its output, then what the output lacks
    float * shares;     // [n_fit_query, n_merged] minus a query's attention to the merged rows
    float * normal;     // [n_merged, n_merged] products of these
    float * move;       // [n_merged, value_stride] by which the values move

    fit_scratch(arena & a, const head_shape & shape, const pass_sizes & n);
};

// Fits biases and values of the merged rows to the queries that come first in pass_rows::q.
//
// The bias: on the average of the logs a row receives the mass that its members received, clamped. The values: least
// squares over the outputs, with a ridge as large as the outputs' mean squared residual asks for in comparison with the
// values' scatter about their means.
void fit(const pass_head & h, const pass_rows & x, const pass_scores & s, const pass_choice & c, pass_merged & m,
    fit_scratch & t);

} // namespace semcache
