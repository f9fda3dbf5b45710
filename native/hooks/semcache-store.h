// semcache-store.h - the compressed rows of a llama_kv_cache, and everything that the patches call
//
// A llama_kv_cache that was built inside a llama_semcache_scope owns one llama_semcache. The cache itself is the stage:
// it is allocated with n_stage cells and goes on doing masks, slots and positions for the newest tokens. The store
// holds what older tokens were compressed to, and the queries of the tokens in the stage.
//
// Call sites (patches/*.patch): the constructor of llama_context opens the scope; that of llama_kv_cache asks for its
// number of cells and attaches the store; init_update(optimize) hands out a pass; clear, seq_rm, seq_keep, seq_pos_*,
// memory_breakdown, state_write and state_read pass through; llama_memory_seq_cp, _add and _div ask semcache_refuses,
// and build_attn_mha asks semcache_build_attn first.

#pragma once

#include "sc-chunk.h"
#include "sc-pass.h"
#include "sc-profile.h"
#include "semcache-residual.h"
#include "semcache.h"

#include "ggml-cpp.h"
#include "llama-memory.h"

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

class llama_kv_cache;
class llama_kv_cache_iswa;
class llama_io_read_i;
class llama_io_write_i;
struct llama_context;
struct llama_cparams;
struct llama_model;

// The thread's last error, for the C API.
void semcache_set_error(semcache_status status, const std::string & message);

// A user's mistake or a lack of memory. It also becomes the thread's last error, since llama.cpp catches exceptions of
// its constructors and state functions itself and reports no more than that they failed.
struct semcache_error : std::runtime_error {
    semcache_error(semcache_status status, const std::string & what) : std::runtime_error(what) {
        semcache_set_error(status, what);
    }
};

// Parameters of the next context, with the profile already read.
struct semcache_config {
    semcache_params params;
    semcache::profile profile; // no heads: equal budgets
    std::string profile_path;
};

// While a llama_context is being built: the configuration that was set for it, if any. Opened on the stack of its
// constructor; throws semcache_error if the model or the context cannot be compressed, before any cache is allocated.
class llama_semcache_scope {
public:
    llama_semcache_scope(const llama_model & model, llama_cparams & cparams, const llama_context_params & params);
    ~llama_semcache_scope();

    llama_semcache_scope(const llama_semcache_scope &) = delete;
    llama_semcache_scope & operator=(const llama_semcache_scope &) = delete;

    // Throws if a configuration was set but no cache took it.
    void finish() const;

    const llama_model & model;
    llama_cparams & cparams;

    std::unique_ptr<semcache_config> config; // NULL: nothing to do
    bool attached = false;
};

class llama_semcache {
public:
    // Rows of one layer. Tensors live in the layer's own backend.
    struct layer {
        uint32_t il;
        int32_t n_head;
        ggml_tensor * k_stage; // of the llama_kv_cache
        ggml_tensor * v_stage;
        ggml_tensor * k;    // F16, Q8_0 or Q4_0 [n_embd_head_k, n_row]
        ggml_tensor * v;    // F16, Q8_0 or Q4_0 [n_embd_head_v, n_row]
        ggml_tensor * bias; // F32 [n_row]
        ggml_tensor * rows; // I32 [n_head_kv, 2] first row of each head and its rows in use, for the graph
        ggml_tensor * q;    // Q8_0 (F16 if rows are no whole blocks) [n_embd_head_k*n_head, n_vote(n_ring) + 1], see
                            // llama_semcache::ring_row
        semcache::head_shape shape;
        int32_t rope;                             // index into ropes; 0 if the graph turns no queries here
        std::vector<int32_t> row_first;           // [n_head_kv + 1]
        std::vector<int32_t> row_count;           // [n_head_kv] rows in use, sinks included
        std::vector<semcache::core_meta> meta;    // [n_row]
        std::vector<semcache::token_votes> votes; // [n_head_kv, n_stage]

        int32_t n_head_kv() const { return (int32_t) row_count.size(); }

        // Tells the graph row_first and row_count.
        void publish() const;
    };

    llama_semcache(llama_kv_cache & kv, const llama_semcache_scope & scope, bool v_trans);

    // NULL if the layer is not compressed.
    layer * find(uint32_t il);

    const std::string arch; // of the model

    bool has_cores() const { return n_past > 0; }
    int32_t pos_end() const { return n_past; }

    // Of n tokens in a row, those that vote at the most.
    int32_t n_vote(int32_t n) const { return asks() ? (n + vote_every - 1) / vote_every : 0; }

    // Whether a token that no pass has asked votes in the next one, and the row of the query ring that its queries then
    // go to. The row behind those of the voters may be written too and is never read.
    bool asks() const { return vote_every > 0; }
    bool is_voter(llama_pos pos) const { return asks() && (pos - n_asked) % vote_every == 0; }
    int64_t ring_row(llama_pos pos) const { return (pos - n_asked) / vote_every; }
    int64_t ring_end() const { return n_vote(n_ring); }

    // Whether the ring has room for the queries of a batch; if not, a pass has to take their votes first. In an empty
    // cache the ring begins where the batch does.
    bool has_room(const std::vector<llama_ubatch> & ubatches);

    // A memory context whose apply() runs a pass; status NO_UPDATE if every token has voted.
    llama_memory_context_ptr init_pass(llama_context * lctx);
    bool pass_possible() const;
    void pass(llama_context * lctx);

    void clear();

    // Whether the positions [p0, p1) of a sequence can be removed, and the removal as far as it concerns the cores.
    bool can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;
    void rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    llama_pos floor(llama_pos pos) const;

    // The same for a cache with sliding-window layers beside it: behind a cut they must still hold their whole window.
    static bool can_rm(const llama_kv_cache_iswa & kv, llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    static llama_pos floor(const llama_kv_cache_iswa & kv, llama_pos pos);

    // The same for any memory that holds this store.
    llama_pos floor(const llama_memory_i & memory, llama_pos pos) const;

    void memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const;

    void state_write_head(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const;
    void state_write_data(llama_io_write_i & io) const;
    void state_read_head(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const;
    void state_read_data(llama_io_read_i & io);

    void stats(semcache_stats & s) const;
    int32_t head_stats(semcache_head_stats * heads, int32_t n) const;

    void calibrate_add(llama_context * lctx);
    const semcache::profile & calibration() const { return measured; }

private:
    // Tokens in the stage in position order.
    struct stage_tokens {
        std::vector<int32_t> cell, pos, tok;
    };
    struct pass_plan;
    struct job;
    class host_layer;

    // Fits core_meta::chunk; every delimiter takes a chunk id, which is free again when the text is cut before it.
    static constexpr int32_t N_CHUNK_MAX = 1 << 24;

    // What a state and the context that reads it must have in common, with names for errors.
    std::vector<std::pair<const char *, uint32_t>> state_head() const;

    // Whether the layers with sliding windows hold what a token at pos would see; a text need not begin at 0.
    static bool window_is_held(const llama_kv_cache_iswa & kv, llama_pos pos);

    stage_tokens collect() const;
    void allocate(const llama_semcache_scope & scope);
    job make_job(layer & l, int32_t ih, const host_layer & host, const stage_tokens & st, int32_t n_sink,
        int32_t n_window, const std::vector<int32_t> & chunk, const std::vector<int32_t> & ring) const;

    // The parts of a pass. Until run_pass() writes its first row nothing is changed, and whatever can fail has not;
    // commit() does not fail.
    pass_plan plan_pass() const;
    std::vector<semcache::pass_workspace> reserve_scratch(const pass_plan & plan, int32_t n_threads) const;
    semcache::pass_result run_pass(const pass_plan & plan, int32_t n_threads);
    void commit(pass_plan && plan, const semcache::pass_result & sum);

    std::vector<std::vector<uint32_t>> groups() const;
    size_t kv_heads() const;
    std::vector<bool> delimiters_of(const stage_tokens & st, int32_t begin, int32_t end) const;

    llama_kv_cache & kv;
    const bool v_trans;
    semcache_params params;
    int32_t n_ctx;
    int32_t n_batch;
    int32_t vote_every; // as VOTE_EVERY; calibration keeps all queries; 0: the method asks none
    int32_t n_ring;     // tokens between two passes at the most
    size_t full_bytes = 0;

    std::vector<layer> layers;
    std::vector<int32_t> layer_of;     // [n_layer] index into layers, or -1
    std::vector<semcache::rope> ropes; // distinct ones, behind one that turns nothing
    std::vector<bool> delimiter;       // [n_vocab]
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    int32_t n_past = 0;           // the tokens before this position went into the cores: the stage begins here
    int32_t n_asked = 0;          // the queries of the tokens before this position have voted
    std::vector<int32_t> n_voted; // [n_stage] tokens whose queries voted on the token in each cell
    semcache::chunker chunker;
    std::vector<int32_t> chunk_start; // [n_chunk] first position of each chunk

    int64_t rows_merged = 0, rows_dropped = 0, n_pass = 0, pass_us = 0, pass_last_us = 0;
    semcache::profile measured; // calibration: the texts so far,
    semcache_residual residual; // and what was seen of the present one
};

// Cells for a cache that is about to be built: those of the stage inside a scope, else kv_size.
uint32_t semcache_n_cells(uint32_t kv_size, llama_swa_type swa_type, const void * other);

// The store for a cache that was just built inside a scope, else NULL.
std::shared_ptr<llama_semcache> semcache_attach(
    llama_kv_cache & kv, llama_swa_type swa_type, const void * other, bool v_trans);

// The cache of a memory context or memory that carries a store; NULL if there is none.
const class llama_kv_cache_context * semcache_find(const llama_memory_context_i * mctx);
llama_semcache * semcache_find(llama_memory_i * memory);

// Positions and the sequence of a compressed cache are fixed, and so is what lies beside it (sliding windows, recurrent
// states): if the memory has a store, says so as the last error and returns true.
bool semcache_refuses(llama_memory_i * memory, const char * what);

// Attention over cores and stage for one layer: what build_attn_mha would return, or NULL if the layer is not
// compressed or has no cores yet, for upstream to go on as always.
struct llm_graph_context;
ggml_tensor * semcache_build_attn(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
    ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int il);

// What semcache_configure_next() left for the next context of this thread, if anything.
std::unique_ptr<semcache_config> semcache_take_pending();
