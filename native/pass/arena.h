// arena.h - scratch of a pass, laid out before it runs

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace semcache {

// Hands out pieces of one block of memory. Over nullptr it only counts.
class arena {
public:
    static constexpr size_t ALIGNMENT = 64;

    // The first aligned byte of a block that is ALIGNMENT larger than what is to be laid out in it.
    static uint8_t * align(uint8_t * p) {
        return (uint8_t *) (((uintptr_t) p + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    }

    explicit arena(uint8_t * base = nullptr) : base(base) {}

    // n values; aligned, not initialized.
    template <typename T> T * take(int64_t n) {
        T * res = base ? (T *) (base + at) : nullptr;
        at += (n * sizeof(T) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        most = std::max(most, at);
        return res;
    }

    // Pieces handed out after a mark share memory with those after the next rewind to it.
    size_t mark() const { return at; }
    void rewind(size_t mark) { at = mark; }

    // Bytes that all this takes.
    size_t size() const { return most; }

private:
    uint8_t * base;
    size_t at = 0, most = 0;
};

// What the sizes of the scratch depend on. Of a head: at most n_rows candidates, sinks and window together, of which at
// most n_loser lose (in the semantic method the candidates above the budget), and n_voter tokens that vote.
struct pass_sizes {
    int32_t n_rows, n_loser, n_voter;
};

} // namespace semcache
