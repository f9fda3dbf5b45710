// pass.h - one pass over one kv head
//
// The phases run in this order, each in a file of its own: load, score, choose, merge, fit, compact. Nothing here
// allocates, so a pass that begins to write also ends.

#pragma once

#include "arena.h"
#include "args.h"

namespace semcache {

// Bytes of scratch for any head within these sizes, see pass_sizes.
size_t pass_scratch_size(const head_shape & shape, const pass_sizes & n);

// The whole pass of head ih, in place; writes its row count. Without candidates it only takes votes.
pass_result compress_head(const pass_args & a, const pass_plan & plan, int32_t ih, uint8_t * scratch);

} // namespace semcache
