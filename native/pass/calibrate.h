// calibrate.h - how far a head's output is off when the head holds fewer rows

#pragma once

#include "args.h"
#include "sc-lookahead.h"

#include <vector>

namespace semcache {

constexpr int32_t CALIBRATE_PASS = 252; // tokens from one pass to the next while heads are measured

struct calibrate_params {
    bool merge;
    int32_t distinct;  // see DISTINCT
    int32_t n_pass;    // tokens from one pass to the next, and
    int32_t n_window;  // those that a pass leaves in the stage
    int32_t n_probe;   // of the text's exact tokens, the last: their queries tell the error
    int32_t n_skip;    // of these, every n_skip-th is used
    int32_t n_horizon; // of the look-ahead
    uint64_t seed;
};

// A text that lies wholly in the stage, with the queries of all of its tokens in the ring.
struct calibrate_text {
    const pass_args * layer;  // of which stage and ring are read
    const rope * turns;       // of its queries
    const int32_t * pos;      // [n_token] ascending
    const int32_t * cell;     // [n_token]
    const int32_t * chunk;    // [n_past - n_sink]
    const int32_t * ring_row; // [n_token]
    int32_t n_token, n_past;  // passes compress the first n_past tokens, sinks among them; the others stay exact
    int32_t n_sink;
};

// The text is compressed in passes as it would be while it is read, once for each of `parts`, with parts[i]*n_past rows
// of head ih. Returns the mean over the probes' queries of |output - exact output|^2 [n_part]. Throws std::bad_alloc.
std::vector<double> output_errors(
    const calibrate_text & text, int32_t ih, const calibrate_params & params, const std::vector<double> & parts);

} // namespace semcache
