// sc-profile.h - which kv head gets how many rows
//
// A profile is a property of a model: how far each head's output is off when the head holds only a part of its rows.
// What heads need differs between heads by orders of magnitude, and little between texts.

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
        std::vector<double> error; // [n_part] see output_errors(), divided by the layer's residual size
    };

    std::string model_id;
    int32_t n_text = 0;
    std::vector<double> parts; // [n_part] rows held, as a part of the tokens seen: ascending, between 0 and 1
    std::vector<head> heads;   // ordered by (il, ih)

    // Reads the text format described in reference/profile.py. On failure returns false and says in `error` what was
    // expected, what was found and where.
    bool read(const std::string & path, std::string & error);

    // Writes to a temporary file beside `path`, then renames. On failure returns false and sets `error`.
    bool write(const std::string & path, std::string & error) const;

    // Adds the errors [n_head][n_part] of one text: the profile holds the mean over texts.
    void add(const std::vector<std::pair<int32_t, int32_t>> & heads, const std::vector<std::vector<double>> & errors);

    // Rows of every head, sinks included, within [lo, n_ctx]: those with the smallest sum of errors whose sum is
    // exactly round(ratio*n_ctx*n_head). Empty if even `lo` rows per head are more than that.
    std::vector<int32_t> budgets(double ratio, int32_t n_ctx, int32_t lo) const;
};

// Parts that a calibration measures.
const std::vector<double> & profile_parts();

// Rows without a profile: the same for every head, the first ones getting what is left over. Empty as in
// profile::budgets.
std::vector<int32_t> equal_budgets(size_t n_head, double ratio, int32_t n_ctx, int32_t lo);

} // namespace semcache
