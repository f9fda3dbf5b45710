// sc-calibrate.h - how far a head's output is off when the head holds fewer rows

#pragma once

#include "sc-pass.h"

#include <vector>

namespace semcache {

// A text that lies wholly in the stage, as one kv head sees it.
struct text_rows {
    stage_rows rows;     // n_sink sinks, n_new tokens that passes compress, n_window tokens that stay exact; no votes
    query_rows queries;  // of all tokens
    const int32_t * pos; // [n_sink + n_new + n_window] ascending
    int32_t n_probe;     // of the exact tokens, the last: their queries tell the error
};

struct calibrate_params {
    pass_params pass;
    int32_t n_pass = 252;   // tokens from one pass to the next, and
    int32_t n_window = 512; // those that a pass leaves in the stage
    int32_t n_skip = 8;     // every so many'th probe is used
    int32_t n_horizon = 512;
    uint64_t seed = 0;
};

// The text is compressed in passes as it would be while it is read, once for each of `parts`, with parts[i]*(n_sink +
// n_new) rows. Returns the mean over the probes' queries of |output - exact output|^2 [n_part]. Throws std::bad_alloc.
std::vector<double> output_errors(const text_rows & text, const head_shape & shape, const rope & r,
    const calibrate_params & params, const std::vector<double> & parts, pass_workspace & ws);

} // namespace semcache
