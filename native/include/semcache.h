// semcache.h - C API of the compressed KV cache inside a patched llama.cpp
//
// The cache of a llama_context is compressed when semcache_configure_next() was called on the same thread before
// llama_init_from_model(). Everything else (llama_decode, llama_memory_*, llama_state_*) is used as always: passes run
// by themselves when the stage has no room for the next batch.
//
// Words. A *row* is one (K, V, bias) of one kv head in one layer. The *stage* is the ordinary llama_kv_cache, only
// n_stage cells large; its newest n_window tokens are never touched. A *core* is a row that stands for one or more
// older tokens of its kv head. A *pass* moves the stage, without its window, into the cores. A *chunk* is a run of
// tokens that ends with a delimiter; clusters never cross it. A pass comes about every n_stage - n_window tokens: their
// queries vote on all rows, and what then leaves the stage is compressed. While there are no more than n_window +
// n_sink tokens, a pass only takes votes.
//
// Batches. A batch may have up to n_batch tokens, as always; n_ubatch is lowered to n_stage - max(n_window, n_sink),
// and a pass runs before each ubatch that has no room. If it fails, llama_decode() returns an error and what was read
// before stays.
//
// Errors. Functions that can fail return a semcache_status; semcache_last_error() then holds the message of this thread
// ("expected ..., got ...; next step"). Nothing here aborts the process.
//
// The part between the two "cffi" marks is read by the Python binding, which knows SEMCACHE_API: no preprocessor lines
// inside.

#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && !defined(__MINGW32__)
    #ifdef LLAMA_BUILD
        #define SEMCACHE_API __declspec(dllexport)
    #else
        #define SEMCACHE_API __declspec(dllimport)
    #endif
#else
    #define SEMCACHE_API __attribute__((visibility("default")))
#endif

struct llama_context;
struct llama_model;

#ifdef __cplusplus
extern "C" {
#endif

// cffi: begin

enum semcache_status {
    SEMCACHE_OK = 0,
    SEMCACHE_ERR_ARGUMENT = 1, // a parameter is out of range
    SEMCACHE_ERR_MODEL = 2,    // this model or context cannot be compressed
    SEMCACHE_ERR_PROFILE = 3,  // profile missing, unreadable, or of another model
    SEMCACHE_ERR_CONTEXT = 4,  // the context has no compressed cache
    SEMCACHE_ERR_STATE = 5,    // the call, or a state of other settings, does not fit the cache, which is as it was
    SEMCACHE_ERR_MEMORY = 6,   // out of memory
    SEMCACHE_ERR_IO = 7        // a file could not be written, or a state is damaged
};

// In the place of a ggml_type: IQ4_NL for rows where all heads are whole blocks of it, Q8_0 for the stage with flash
// attention where they are multiples of 64 values, but not in a calibration; else F16.
enum { SEMCACHE_TYPE_AUTO = -1 };

enum semcache_method {
    SEMCACHE_METHOD_SEMANTIC = 0,  // look-ahead score, profile budgets, mass-weighted merge, fitted bias
    SEMCACHE_METHOD_PAPER = 1,     // equal budgets, greedy seeds in reading order, cosine threshold, plain mean, log n
    SEMCACHE_METHOD_STREAMING = 2, // sinks and the newest tokens only (StreamingLLM); a baseline
    SEMCACHE_METHOD_KEYDIFF = 3, // eviction by others, equal budgets, nothing merged; baselines, see native/core/evict
    SEMCACHE_METHOD_KNORM = 4,
    SEMCACHE_METHOD_SNAPKV = 5,
    SEMCACHE_METHOD_TOVA = 6,
    SEMCACHE_METHOD_H2O = 7
};

enum { SEMCACHE_MAX_ROOM = 4096 }; // n_stage - n_window: the scratch of a pass grows with its square

struct semcache_params {
    size_t struct_size; // sizeof(struct semcache_params); set by semcache_default_params()
    int32_t method;     // enum semcache_method
    float ratio;        // rows allocated for cores, as a share of n_ctx, mean over kv heads; 0 < ratio <= 1
    int32_t n_stage;    // cells of the stage; n_window + n_sink < n_stage <= min(n_ctx, n_window + SEMCACHE_MAX_ROOM)
    int32_t n_window;   // newest tokens of the stage that a pass leaves alone; >= 1
    int32_t n_sink;     // first tokens of the sequence, never merged or dropped, stored in F16; >= 0
    int32_t n_horizon;  // the look-ahead rotates queries to n_past + n_window + [0, n_horizon); >= 1
    int32_t n_chunk;    // longest chunk, tokens; 1 to 255
    int32_t type_k;     // ggml_type of the cores' K: F16, Q8_0, Q5_0, Q4_0, IQ4_NL or SEMCACHE_TYPE_AUTO
    int32_t type_v;     // ggml_type of the cores' V, likewise
    int32_t type_stage; // ggml_type of the stage: F16, with which attention is llama.cpp's own until there are cores,
                        // Q8_0, which needs flash attention, or SEMCACHE_TYPE_AUTO
    int32_t merge;      // 1: losers are merged into winners of their chunk; 0: they are dropped
    int32_t distinct;  // percent of a head's rows that go to the keys least like the others, whatever their score; 0 to
                       // 100; a calibration has none
    int32_t calibrate; // 1: the context is for semcache_calibrate_add() and also watches the residual stream
    uint64_t seed;     // of the look-ahead positions
    const char * profile_path; // budgets per (layer, kv head); NULL: equal budgets
    const char * model_id;     // the profile must carry the same id; NULL: not checked
};

struct semcache_stats {
    int32_t method;         // enum semcache_method
    int32_t n_layer;        // compressed layers
    int32_t n_head_kv;      // kv heads, all compressed layers together
    int32_t n_ctx;          // logical context size, tokens
    int32_t n_stage;        // cells
    int32_t n_window;       // tokens
    int32_t n_batch;        // largest batch that llama_decode takes, as llama_n_batch()
    int64_t n_tokens;       // tokens represented: those whose position is below the end of the sequence
    int64_t n_tokens_stage; // of these, tokens in the stage, one by one
    int64_t rows_allocated; // rows for cores, all layers and heads
    int64_t rows_used;
    int64_t rows_merged;  // candidates merged into another row since the cache was last empty
    int64_t rows_dropped; // candidates dropped since the cache was last empty
    int64_t n_pass;       // passes since the context was made
    int64_t pass_us;      // microseconds spent in them
    int64_t pass_last_us;
    int64_t core_bytes;  // allocated: K, V and bias of the cores, frames and sinks of the heads
    int64_t stage_bytes; // allocated: K and V of the stage in the compressed layers
    int64_t query_bytes; // allocated: ring of the queries since the last pass
    int64_t meta_bytes;  // allocated: scores and origins of the cores, votes on the stage
    int64_t work_bytes;  // allocated: what passes work in, on devices; in host memory it is there while a pass runs
    int64_t full_bytes;  // what an uncompressed f16 cache would take for the compressed layers
};

struct semcache_head_stats {
    int32_t il;   // layer
    int32_t head; // kv head
    int32_t rows_allocated;
    int32_t rows_used;
    int32_t n_rot; // values that RoPE turns in a query; 0 in a layer without
};

// Parameters with their defaults; docs/decisions.md says how they were chosen.
SEMCACHE_API struct semcache_params semcache_default_params(void);

// The next llama_init_from_model() on this thread builds a compressed cache. The parameters are copied. NULL takes a
// previous call back. Checked here: ranges and the profile file; checked by llama_init_from_model(), which then returns
// NULL with semcache_last_error() set: what depends on the model. After a failure pass NULL: llama.cpp checks some of
// its own parameters before it comes to ours, which then wait for the next call.
SEMCACHE_API int32_t semcache_configure_next(const struct semcache_params * params);

// Message of the last failed call on this thread, "" if none. Valid until the next call on this thread.
SEMCACHE_API const char * semcache_last_error(void);

// Status that belongs to semcache_last_error().
SEMCACHE_API int32_t semcache_last_status(void);

// SEMCACHE_OK if the context has a compressed cache, SEMCACHE_ERR_CONTEXT if not (ctx may be a stock one).
SEMCACHE_API int32_t semcache_get_stats(const struct llama_context * ctx, struct semcache_stats * stats);

// Bytes of all KV caches of a context, compressed or stock, as llama.cpp's own memory breakdown reports them.
// -semcache_status on failure.
SEMCACHE_API int64_t semcache_kv_bytes(const struct llama_context * ctx);

// Writes up to n entries ordered by (il, head) and returns the number of entries there are, or -semcache_status.
SEMCACHE_API int32_t semcache_get_head_stats(
    const struct llama_context * ctx, struct semcache_head_stats * heads, int32_t n);

// Largest position q <= pos for which llama_memory_seq_rm(mem, 0, q, -1) succeeds: pos itself inside the stage, else
// the start of a chunk, else 0. Negative: -semcache_status.
SEMCACHE_API int32_t semcache_floor(const struct llama_context * ctx, int32_t pos);

// Calibration. The context must have calibrate = 1 and hold one text that still lies wholly in the stage. The text is
// compressed in a copy, every head at several budgets, and what the heads' outputs are off by then is added to the
// running profile.
SEMCACHE_API int32_t semcache_calibrate_add(struct llama_context * ctx);

// Writes the profile of all texts added so far.
SEMCACHE_API int32_t semcache_calibrate_write(struct llama_context * ctx, const char * path, const char * model_id);

// What an architecture (general.architecture of a GGUF file) has that keeps its cache from being compressed, whatever
// the model: "ALiBi positions". NULL if there is nothing of the kind, or this llama.cpp does not know the architecture.
SEMCACHE_API const char * semcache_arch_obstacle(const char * arch);

// Bytes that passes work in on a device that computes them, at the most, whatever a profile gives to a head, in a model
// of n_layer such layers: n_head_kv kv heads of n_gqa query heads each, those of layers that read their K and V
// included. -semcache_status on failure.
SEMCACHE_API int64_t semcache_work_bytes(const struct semcache_params * params, int32_t n_ctx, int32_t n_layer,
    int32_t n_head_kv, int32_t n_gqa, int32_t n_embd_head_k, int32_t n_embd_head_v);

// Whether a GPU that this build knows, and that is there, computes passes by the method that is set: 0 or 1.
SEMCACHE_API int32_t semcache_passes_on_device(const struct semcache_params * params);

SEMCACHE_API const char * semcache_version(void);         // of this package
SEMCACHE_API const char * semcache_upstream_commit(void); // 40 hex digits of the llama.cpp commit that was patched

// cffi: end

#ifdef __cplusplus
}
#endif
