// compact.h - phase 6: the rows that stay go to their places

#pragma once

#include "merge.h"

namespace semcache {

// Writes sinks and winners, in text order, and the head's number of rows. A row's place is never behind the row itself,
// so going forward overwrites only what was read; a row that stays as it is keeps its bytes.
pass_result compact(const pass_head & h, pass_rows & x, const pass_choice & c, pass_merged & m);

} // namespace semcache
