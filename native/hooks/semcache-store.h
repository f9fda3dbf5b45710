// semcache-store.h - the rows: tensors of every compressed layer, and how they are allocated, cut and counted

#pragma once

#include "pass/args.h"
#include "sc-lookahead.h"
#include "semcache-error.h"

#include "ggml-cpp.h"
#include "llama-memory.h"

#include <algorithm>
#include <map>
#include <vector>

class llama_semcache_scope;

// A layer of the cache that is the stage.
struct semcache_stage_layer {
    uint32_t il;
    ggml_tensor * k;
    ggml_tensor * v;
    std::vector<uint32_t> readers; // layers without K and V of their own that attend to these
};

class semcache_store {
public:
    // Rows of one layer, all heads one after the other. Tensors live in the layer's own backend.
    struct layer {
        uint32_t il;
        std::vector<uint32_t> readers; // see semcache_stage_layer; their queries vote too
        int32_t n_head;                // of one of these layers
        semcache::head_shape shape;
        ggml_tensor * k_stage; // of the llama_kv_cache
        ggml_tensor * v_stage;
        ggml_tensor * k;       // semcache_params::type_k [n_embd_head_k, n_row]
        ggml_tensor * v;       // type_v [n_embd_head_v, n_row]
        ggml_tensor * bias;    // F16 [n_row]
        ggml_tensor * s_use;   // F16 [n_row] see pass_args, and so on; F32 as s_policy
        ggml_tensor * origin;  // I32 [n_row]
        ggml_tensor * heads;   // F16 [head_size, n_head_kv]
        ggml_tensor * rows;    // I32 [n_head_kv, 2] first row of each head, and its rows in use
        ggml_tensor * vote_p4; // F32 [n_stage, n_head_kv]
        ggml_tensor * vote_p;  // F32 [n_stage, n_head_kv]
        ggml_tensor * q; // quantized, or F16 if heads do not fill blocks [n_embd_head_k*n_head*n_q_layer, n_ring + 1]
        int32_t rope;    // index into ropes; 0: queries are not turned

        // Weights of RMS norms that follow RoPE: [n_q_layer, n_embd_head_k] if any layer has one.
        std::vector<float> q_weight;
        std::vector<const ggml_tensor *> q_weight_of; // [n_q_layer] where they come from

        std::vector<int32_t> row_first; // [n_head_kv + 1]
        std::vector<int32_t> row_count; // [n_head_kv] rows in use, sinks included, as the tensor has them

        int32_t n_head_kv() const { return (int32_t) row_count.size(); }

        // Layers whose queries are in the ring: this one, then its readers; and the place of one of them.
        int32_t n_q_layer() const { return 1 + (int32_t) readers.size(); }
        int32_t q_layer(uint32_t layer) const {
            return (int32_t) (std::find(readers.begin(), readers.end(), layer) - readers.begin() + 1) % n_q_layer();
        }
        int32_t n_alloc(int32_t ih) const { return row_first[ih + 1] - row_first[ih]; }

        // Of a tensor of rows, the bytes of one.
        size_t row_bytes(const ggml_tensor * t) const { return ggml_nbytes(t) / row_first.back(); }

        // Row counts between host and tensor.
        void put_counts() const;
        void get_counts();

        std::vector<ggml_tensor *> row_tensors() const { return { k, v, bias, s_use, origin }; }
    };

    // n_vote_row: rows of the query ring.
    semcache_store(
        const std::vector<semcache_stage_layer> & stage, const llama_semcache_scope & scope, int64_t n_vote_row);

    // The layer whose keys of the stage these are; NULL if it is not compressed.
    layer * find(const ggml_tensor * k_stage);

    // What the model's graph says of the attention of layer il, which is l or a reader of it; known no earlier.
    // q_weight: [n_embd_head_k] that queries were multiplied by after RoPE; NULL: by nothing.
    void note_attention(layer & l, uint32_t il, float scale, bool is_turned, const ggml_tensor * q_weight);

    size_t n_head_kv() const; // of all layers

    // No rows. The tensors must not be in use.
    void clear();

    // Whether a layer's rows are where the CPU can read them; and if not, where a device's passes over them work: NULL
    // if it computes none.
    bool in_host_memory(const layer & l) const { return ggml_backend_buffer_is_host(l.k->buffer); }
    ggml_tensor * work(const layer & l) const;

    // Takes away all cores of this chunk and behind it.
    void cut(int32_t chunk);

    void memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const;
    void stats(semcache_stats & s) const;
    int32_t head_stats(semcache_head_stats * heads, int32_t n) const;

    // The layer as a pass sees it, but for what belongs to l.rope.
    semcache::pass_args args(const layer & l, bool v_trans, bool k_rotated) const;

    semcache_params params;
    std::vector<layer> layers;
    std::vector<semcache::rope> ropes; // distinct ones, behind one that turns nothing

private:
    void make_layers(const std::vector<semcache_stage_layer> & stage, const llama_semcache_scope & scope,
        const std::vector<int32_t> & rows);
    void make_tensors(ggml_context * ctx, layer & l, int64_t n_vote_row) const;
    void allocate(const llama_semcache_scope & scope, int64_t n_vote_row);
    void allocate_work(ggml_backend_buffer_type_t buft, int64_t n_vote_row);

    size_t full_bytes = 0;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    struct device_work {
        ggml_context_ptr ctx;
        ggml_backend_buffer_ptr buf;
        ggml_tensor * t; // I8 [n]
    };
    std::map<ggml_backend_buffer_type_t, device_work> works; // of devices
};
