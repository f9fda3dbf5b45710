// semcache-hooks.h - all that the patched files of llama.cpp see
//
// A llama_kv_cache that was built inside a llama_semcache_scope owns one llama_semcache. The cache itself is the stage:
// it is allocated with n_stage cells and goes on doing masks, slots and positions for the newest tokens.
//
// Call sites (patches/*.patch): the constructor of llama_context opens the scope; that of llama_kv_cache asks for its
// number of cells and their types and attaches the store; the memory context of a batch asks for cells before each
// ubatch; clear, seq_rm, seq_keep, seq_pos_*, memory_breakdown, state_write and state_read pass through;
// llama_memory_seq_cp, _add and _div ask semcache_refuses, decode asks semcache_refuses_non_causal, and build_attn_mha
// asks semcache_build_attn first.

#pragma once

#include "llama-memory.h"

#include <functional>
#include <map>
#include <memory>

class llama_kv_cache;
class llama_kv_cache_iswa;
class llama_io_read_i;
class llama_io_write_i;
struct llama_context;
struct llama_context_params;
struct llama_cparams;
struct llama_model;
struct semcache_config;

// While a llama_context is being built: the configuration that was set for it, if any. Opened on the stack of its
// constructor; throws semcache_error if the model or the context cannot be compressed, before any cache is allocated.
class llama_semcache_scope {
public:
    llama_semcache_scope(
        llama_context & lctx, const llama_model & model, llama_cparams & cparams, const llama_context_params & params);
    ~llama_semcache_scope();

    llama_semcache_scope(const llama_semcache_scope &) = delete;
    llama_semcache_scope & operator=(const llama_semcache_scope &) = delete;

    // Throws if a configuration was set but no cache took it.
    void finish() const;

    llama_context & lctx;
    const llama_model & model;
    llama_cparams & cparams;

    std::unique_ptr<semcache_config> config; // NULL: nothing to do
    bool attached = false;
};

// The compressed rows of one llama_kv_cache, and where its text stands.
class llama_semcache {
public:
    struct parts;

    explicit llama_semcache(std::unique_ptr<parts> p);
    ~llama_semcache();

    bool has_cores() const;
    llama_pos pos_begin() const; // of the text, while there are cores
    llama_pos pos_end() const;   // the stage begins here

    // Room for an ubatch: runs a pass if there is none. If this fails, returns false with semcache_last_error() set,
    // and the cache is as it was.
    bool make_room(const llama_ubatch & ubatch);

    void clear();

    // Whether the positions [p0, p1) of a sequence can be removed, and the removal as far as it concerns the cores.
    bool can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;
    void rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // The same for a cache with sliding-window layers beside it: behind a cut they must still hold their whole window.
    static bool can_rm(const llama_kv_cache_iswa & kv, llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    void memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const;

    // Call write or read with an io that sums up what passes through it, and put the checksum behind it or compare it;
    // a state with another one leaves an empty cache and throws. False, without a call, if this io sums up already.
    bool write_with_sum(llama_io_write_i & io, const std::function<void(llama_io_write_i &)> & write) const;
    bool read_with_sum(llama_io_read_i & io, const std::function<void(llama_io_read_i &)> & read);

    // A state is written and read in two parts, before and after the cells of the cache.
    void state_write_head(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const;
    void state_write_data(llama_io_write_i & io) const;
    void state_read_head(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const;
    void state_read_data(llama_io_read_i & io);

    // Not for the patches.
    parts & own() const { return *p; }

private:
    std::unique_ptr<parts> p;
};

// A cache that is about to be built: inside a scope it gets the cells and types of the stage, else they stay.
void semcache_shape_cache(
    uint32_t & kv_size, ggml_type & type_k, ggml_type & type_v, llama_swa_type swa_type, const void * other);

// The store for a cache that was just built inside a scope, else NULL.
std::shared_ptr<llama_semcache> semcache_attach(
    llama_kv_cache & kv, llama_swa_type swa_type, const void * other, bool v_trans);

// Positions and the sequence of a compressed cache are fixed, and so is what lies beside it (sliding windows, recurrent
// states): if the memory has a store, says so as the last error and returns true.
bool semcache_refuses(llama_memory_i * memory, const char * what);

// Attention that looks ahead, as within a picture, does not go with passes between ubatches: as above, asked by decode.
bool semcache_refuses_non_causal(llama_memory_i * memory, const llama_cparams & cparams);

// Attention over cores and stage for one layer: what build_attn_mha would return, or NULL if the layer is not
// compressed, or has no cores yet and a stage of f16, for upstream to go on as always.
struct llm_graph_context;
ggml_tensor * semcache_build_attn(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
    ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int il);
