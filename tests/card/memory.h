// memory.h - memory of a device that is made of the CPU: between operations it is out of reach for the process, and
// what reads or writes it as the host's dies at once

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <mutex>

namespace card {

constexpr size_t MEMORY = (size_t) 1 << 32; // what it says that it has

// All of its memory, and who has it open.
struct memory_map {
    std::mutex mutex;
    std::map<void *, size_t> pieces;
    int n_open = 0;
    size_t n_bytes = 0, most = MEMORY; // allocated, and what there is to allocate

    void protect(int how) {
        for (const auto & [p, n] : pieces) {
            mprotect(p, n, how);
        }
    }
    void * allocate(size_t n) {
        const std::lock_guard lock(mutex);
        if (n_bytes + n > most) {
            return nullptr;
        }
        void * p = mmap(nullptr, std::max<size_t>(n, 1), n_open ? PROT_READ | PROT_WRITE : PROT_NONE,
            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) {
            return nullptr;
        }
        pieces[p] = std::max<size_t>(n, 1);
        n_bytes += n;
        return p;
    }
    void release(void * p) {
        const std::lock_guard lock(mutex);
        n_bytes -= pieces[p];
        munmap(p, pieces[p]);
        pieces.erase(p);
    }
};

inline memory_map card_memory;

struct open_memory {
    open_memory() {
        const std::lock_guard lock(card_memory.mutex);
        if (card_memory.n_open++ == 0) {
            card_memory.protect(PROT_READ | PROT_WRITE);
        }
    }
    ~open_memory() {
        const std::lock_guard lock(card_memory.mutex);
        if (--card_memory.n_open == 0) {
            card_memory.protect(PROT_NONE);
        }
    }
};

} // namespace card
