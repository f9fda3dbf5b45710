// sc-profile.h - the share of the rows that every kv head gets
//
// A profile is a property of a model: which heads need many rows differs between heads by far more than between texts.

#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace semcache {

struct profile {
    struct head {
        int32_t il;                // layer
        int32_t ih;                // kv head
        std::vector<double> share; // [n_ratio] rows kept of all rows of this head, 0..1
    };

    std::string         model_id;
    int32_t             n_text = 0;
    std::vector<double> ratios; // [n_ratio] descending, below 1
    std::vector<head>   heads;  // ordered by (il, ih)

    // Reads the text format described in models/README.md. On failure returns false and says in `error` what was expected,
    // what was found and where.
    bool read(const std::string & path, std::string & error);

    // Writes to a temporary file beside `path`, then renames. On failure returns false and sets `error`.
    bool write(const std::string & path, std::string & error) const;

    // Share of every head at `ratio`: linear in log2(ratio) between the profile's ratios, 1 at ratio 1, proportional below
    // the smallest.
    std::vector<double> at(double ratio) const;
};

// Ratios that a calibration measures.
const std::vector<double> & profile_ratios();

// Adds one text to a profile. scores[h] are the scores of head h's candidates; for every ratio one threshold over all heads
// lets that share of all candidates survive.
void profile_add(profile & p, const std::vector<std::pair<int32_t, int32_t>> & heads, const std::vector<std::vector<float>> & scores);

// Rows of every head, sinks included: proportional to `share` within [lo, n_ctx], their sum exactly round(ratio*n_ctx*n_head).
// Empty if even `lo` rows per head are more than that.
std::vector<int32_t> budgets(const std::vector<double> & share, double ratio, int32_t n_ctx, int32_t lo);

} // namespace semcache
