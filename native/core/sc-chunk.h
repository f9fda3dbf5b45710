// sc-chunk.h - where a text is cut: the delimiter table of a vocabulary, and the chunker

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace semcache {

// True if a token with this text ends a chunk: its text without trailing spaces ends in a sentence or clause mark
// (also CJK and full-width forms), a newline, a brace or a semicolon.
bool is_delimiter(const std::string & piece);

// Gives consecutive tokens their chunk ids. A chunk ends after a delimiter or when it is n_chunk tokens long.
struct chunker {
    int32_t n_chunk = 32; // longest chunk, tokens
    int32_t next_id = 0;  // id of the chunk that the next call starts

    // delimiter [n], ids [n]. Every call starts a new chunk, so that a chunk lies within one pass.
    void run(const std::vector<bool> & delimiter, std::vector<int32_t> & ids);
};

} // namespace semcache
