// sc-gpu-cpu.h - runs a kernel on the CPU, for tests: a fiber for every thread of a block, blocks one after the other
//
// A fiber runs until it waits for others. Shared memory is allocated anew for every block, to the byte, and full of
// NaN: ASan sees what lies outside of it, and results show what was never written. Under TSan fibers are threads that
// only barriers and exchanges within a warp order: a missing barrier is a data race, and so are two blocks that write
// to one place. A barrier that not all threads of a block reach ends the program.

#pragma once

#include "sc-gpu-words.h"
#include "sc-vec.h"

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
    #include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
    #include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char *, int);
void AnnotateIgnoreReadsEnd(const char *, int);
void AnnotateIgnoreWritesBegin(const char *, int);
void AnnotateIgnoreWritesEnd(const char *, int);
}
#endif

struct sc_tid {
    uint id, lane, warp, x, y;
};

namespace sc_cpu {

// What the emulation itself touches is none of TSan's business.
struct quiet {
#if defined(__SANITIZE_THREAD__)
    quiet() {
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~quiet() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    }
#else
    quiet() {}
#endif
};

// Of a block, or of a warp. A fiber may be at the next one while others have yet to leave this one, so generations have
// sync objects of their own.
struct meeting {
    int n = 0, gen = 0;
    char sync[2];
};

struct fiber {
    ucontext_t ctx;
    char * stack = nullptr;
    bool done = false;
    void *fake = nullptr, *tsan = nullptr;
};

struct block {
    static constexpr size_t STACK = 128 * 1024, PARCEL = 16;
    std::vector<fiber> f;
    std::vector<meeting> warps;
    std::vector<float> slot;
    std::vector<char> parcel; // of every thread, twice: the next exchange uses the other half
    meeting all;
    ucontext_t main;
    void *main_fake = nullptr, *main_tsan = nullptr, *end = nullptr;
    const void * main_bottom = nullptr;
    size_t main_size = 0;
    int cur = -1, stuck = 0;
    std::function<void(int)> body;
};

#define SC_UNSEEN __attribute__((no_sanitize_thread))

inline SC_UNSEEN block *& now() {
    static block * b;
    return b;
}

inline SC_UNSEEN void to_main() {
    block & b = *now();
    fiber & f = *(b.f.data() + b.cur);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(f.done ? nullptr : &f.fake, b.main_bottom, b.main_size);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(b.main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&f.ctx, &b.main);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(f.fake, &b.main_bottom, &b.main_size);
#endif
}

inline void entry() {
    block * b;
    int i;
    {
        quiet q;
        b = now();
        i = b->cur;
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &b->main_bottom, &b->main_size);
#endif
    b->body(i);
#if defined(__SANITIZE_THREAD__)
    __tsan_release(b->end);
#endif
    {
        quiet q;
        b->f[i].done = true;
        b->stuck = 0;
    }
    to_main();
}

inline void resume(block & b, int i) {
    b.cur = i;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&b.main_fake, b.f[i].stack, block::STACK);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(b.f[i].tsan, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&b.main, &b.f[i].ctx);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(b.main_fake, nullptr, nullptr);
#endif
}

inline void meet(block & b, meeting & m, int n) {
    const int gen = m.gen;
#if defined(__SANITIZE_THREAD__)
    __tsan_release(&m.sync[gen & 1]);
#endif
    b.stuck = 0;
    if (++m.n == n) {
        m.n = 0;
        ++m.gen;
    }
    while (m.gen == gen) {
        if (++b.stuck > 4 * (int) b.f.size()) {
            fprintf(stderr, "a barrier that not all threads of the block reach\n");
            abort();
        }
        to_main();
    }
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(&m.sync[gen & 1]);
#endif
}

// A function of its own, since getcontext() returns twice for all the compiler knows.
__attribute__((noinline)) inline void begin(fiber & f, char * stack) {
    f.stack = stack;
    getcontext(&f.ctx);
    f.ctx.uc_stack.ss_sp = stack;
    f.ctx.uc_stack.ss_size = block::STACK;
    f.ctx.uc_link = nullptr;
    makecontext(&f.ctx, (void (*)()) entry, 0);
#if defined(__SANITIZE_THREAD__)
    f.tsan = __tsan_create_fiber(0);
#endif
}

// kernel(const sc_tid &, shared) for every thread of grid_x*grid_y blocks of n threads
template <typename K> void launch(uint grid_x, uint grid_y, uint n, size_t shared_bytes, K && kernel) {
    quiet q;
    int end = 0;
    static std::vector<std::unique_ptr<char[]>> stacks;
    for (uint at = 0; at < grid_x * grid_y; ++at) {
        std::unique_ptr<block> owner(new block);
        block & b = *owner;
        now() = &b;
        std::unique_ptr<uchar, void (*)(void *)> sh((uchar *) aligned_alloc(16, (shared_bytes + 15) / 16 * 16), free);
        memset(sh.get(), 0xff, shared_bytes);
        b.end = &end;
        b.f.resize(n);
        b.warps.resize((n + 31) / 32);
        b.slot.resize(2 * n);
        b.parcel.resize(2 * n * block::PARCEL);
        b.body = [&](int i) {
            kernel(sc_tid{ (uint) i, (uint) i % 32, (uint) i / 32, at % grid_x, at / grid_x }, sh.get());
        };
#if defined(__SANITIZE_THREAD__)
        b.main_tsan = __tsan_get_current_fiber();
#endif
#if defined(__SANITIZE_THREAD__)
        stacks.clear(); // two blocks that use the same memory one after the other would be a race
#endif
        while (stacks.size() < n) {
            stacks.emplace_back(new char[block::STACK]);
        }
        for (uint i = 0; i < n; ++i) {
            begin(b.f[i], stacks[i].get());
        }
        for (bool any = true; any;) {
            any = false;
            for (uint i = 0; i < n; ++i) {
                if (!b.f[i].done) {
                    resume(b, (int) i);
                    any = true;
                }
            }
        }
#if defined(__SANITIZE_THREAD__)
        for (fiber & f : b.f) {
            __tsan_destroy_fiber(f.tsan);
        }
#endif
    }
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(&end);
#endif
    now() = nullptr;
}

} // namespace sc_cpu

SC_DEVICE void sc_sync(const sc_tid &) {
    sc_cpu::quiet q;
    sc_cpu::block & b = *sc_cpu::now();
    sc_cpu::meet(b, b.all, (int) b.f.size());
}

SC_DEVICE float sc_xor(const sc_tid & t, float x, ushort mask) {
    sc_cpu::quiet q;
    sc_cpu::block & b = *sc_cpu::now();
    sc_cpu::meeting & w = b.warps[t.warp];
    float * slot = b.slot.data() + (w.gen & 1) * b.f.size(); // the next exchange uses the other half
    slot[t.id] = x;
    sc_cpu::meet(b, w, 32);
    return slot[t.id ^ mask];
}

namespace sc_cpu {

// Calls f(lane, its x) for every lane of the warp.
template <typename T, typename F> void exchange(const sc_tid & t, const T & x, F && f) {
    static_assert(sizeof(T) <= block::PARCEL);
    quiet q;
    block & b = *now();
    meeting & w = b.warps[t.warp];
    char * of_warp = b.parcel.data() + ((w.gen & 1) * b.f.size() + t.warp * 32) * block::PARCEL;
    memcpy(of_warp + t.lane * block::PARCEL, &x, sizeof(T));
    meet(b, w, 32);
    for (int lane = 0; lane < 32; ++lane) {
        T y;
        memcpy(&y, of_warp + lane * block::PARCEL, sizeof(T));
        f(lane, y);
    }
}

} // namespace sc_cpu

SC_DEVICE float sc_h2f(sc_half x) { return semcache::f16_to_f32(x); }
SC_DEVICE sc_half sc_f2h(float x) { return semcache::f32_to_f16(x); }
SC_DEVICE sc_half sc_bits2h(ushort x) { return x; }
SC_DEVICE float sc_exp(float x) { return std::exp(x); }
SC_DEVICE float sc_tanh(float x) { return std::tanh(x); }
SC_DEVICE float sc_max(float a, float b) { return a > b ? a : b; }
SC_DEVICE float sc_rsqrt(float x) { return 1.0f / std::sqrt(x); }
SC_DEVICE float sc_sqrt(float x) { return std::sqrt(x); }
SC_DEVICE float sc_log(float x) { return std::log(x); }
SC_DEVICE float sc_round(float x) { return std::round(x); }
SC_DEVICE ushort sc_h2bits(sc_half x) { return x; }
SC_DEVICE uint sc_float_bits(float x) {
    uint y;
    memcpy(&y, &x, sizeof(y));
    return y;
}
