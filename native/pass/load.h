// load.h - phase 1: rows and queries as float32

#pragma once

#include "arena.h"
#include "head.h"

namespace semcache {

// Rows in candidate order, see pass_head. Read by all later phases, written by none but choose_paper()'s norms.
struct pass_rows {
    float * k; // [n_rows, n_embd_head_k]
    float * v; // [n_rows, value_stride]

    // Queries turned forward, with the scale of the logits in them; those that merged rows are fitted to come first.
    float * q; // [n_query, n_embd_head_k]

    pass_rows(arena & a, const head_shape & shape, const pass_sizes & n);
};

// Floats from one value or output to the next: whole tiles, the rest is zero.
inline int64_t value_stride(const head_shape & shape) { return pad_to(shape.n_embd_head_v, MAX_NR); }

// Query rows that merged rows are fitted to, see fit_stride().
int32_t n_fit_query(const pass_head & h);

void load_rows(const pass_head & h, pass_rows & x);

// stride: the queries of every stride'th voter come first.
void load_queries(const pass_head & h, int32_t stride, pass_rows & x);

} // namespace semcache
