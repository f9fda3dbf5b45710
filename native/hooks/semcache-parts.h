// semcache-parts.h - what a llama_semcache is made of

#pragma once

#include "pass/plan.h"
#include "sc-profile.h"
#include "semcache-hooks.h"
#include "semcache-residual.h"
#include "semcache-store.h"

#include <string>

struct llama_semcache::parts {
    parts(llama_kv_cache & kv, const llama_semcache_scope & scope, bool v_trans);

    llama_context & lctx;
    llama_kv_cache & kv; // the stage
    const bool v_trans;
    const std::string arch; // of the model
    const int32_t n_ctx;
    std::vector<bool> delimiter; // [n_vocab]

    semcache::timeline time;
    semcache_store store;

    semcache::profile measured; // calibration: the texts so far,
    semcache_residual residual; // and what was seen of the present one

    int64_t rows_merged = 0, rows_dropped = 0, n_pass = 0, pass_us = 0, pass_last_us = 0;

    // The stage's tokens in position order.
    semcache::stage_tokens collect() const;

    // Whether llama.cpp rotates queries and the keys of the stage, as it does where that is quantized.
    bool k_rotated() const;

    int32_t n_stage_used() const;
    llama_pos pos_max() const; // -1 if the stage is empty

    void clear();

    // Waits for graphs that use the tensors.
    void synchronize() const;

    // The largest position up to pos at which any memory that holds this store can be cut; 0: only altogether.
    llama_pos floor(const llama_memory_i & memory, llama_pos pos) const;

    // Whether the layers with sliding windows hold what a token at pos would see; a text need not begin at 0.
    static bool window_is_held(const llama_kv_cache_iswa & kv, llama_pos pos);

    void stats(semcache_stats & s) const;

    // semcache-pass.cpp: throws std::bad_alloc or semcache_error before anything is changed.
    void run_pass(int32_t n_room);
    void calibrate_add();
};

// The cache of a memory context or memory that carries a store; NULL if there is none.
const class llama_kv_cache_context * semcache_find(const llama_memory_context_i * mctx);
llama_semcache * semcache_find(llama_memory_i * memory);
