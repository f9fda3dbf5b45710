// Plain C++: ggml-metal-device.h has all of Metal that is needed, and compiles a library from a string.

#include "ggml-prop-attn-metal.h"

#include "ggml-backend-impl.h"
#include "gpu/run-attn.h"
#include "gpu/run-pass.h"

#include <map>
#include <mutex>
#include <string>

extern const char PROP_ATTN_MSL[]; // pass.metal and prop-attn.metal with all that they include

namespace {

constexpr int N_BLOCK = 64;         // that a device runs at once, about: none says how many cores it has
constexpr size_t SHARED = 32 << 10; // what a block may share at the most, on all of them
constexpr size_t SHARED_ALIGNMENT = 16;

// Kernels of a device, compiled when they are asked for; never given back, as upstream's are not.
class metal_kernels {
public:
    explicit metal_kernels(ggml_metal_device_t dev) {
        const ggml_metal_device_props * props = ggml_metal_device_get_props(dev);
        // Apple's own: SIMD groups of SC_WARP threads
        if (props->supports_gpu_family_apple7 && props->max_theadgroup_memory_size >= SHARED) {
            library = ggml_metal_library_init_from_source(dev, PROP_ATTN_MSL, /*verbose =*/true);
        }
        if (!library) {
            GGML_LOG_WARN("%s: no kernels for %s: a compressed KV cache stays with the CPU\n", __func__, props->name);
        }
    }

    static metal_kernels & of(ggml_metal_device_t dev) {
        static std::mutex mutex;
        static std::map<ggml_metal_device_t, metal_kernels> all;
        const std::lock_guard<std::mutex> lock(mutex);
        return all.try_emplace(dev, dev).first->second;
    }

    // With no pipeline: it cannot be compiled, or runs fewer threads than a block has.
    ggml_metal_pipeline_with_params get(const std::string & name) {
        ggml_metal_pipeline_with_params p = ggml_metal_library_get_pipeline(library, name.c_str());
        if (!p.pipeline) {
            p = ggml_metal_library_compile_pipeline(library, name.c_str(), name.c_str(), nullptr);
        }
        if (p.pipeline && ggml_metal_pipeline_max_theads_per_threadgroup(p) < SC_THREADS) {
            p.pipeline = nullptr;
        }
        return p;
    }

    // Whether all kernels of these names are there; asked for every node, so answers are kept.
    bool have(int64_t key, const std::vector<std::string> & names) {
        const std::lock_guard<std::mutex> lock(mutex);
        const auto known = answers.find(key);
        if (known != answers.end()) {
            return known->second;
        }
        const bool all = library && std::all_of(names.begin(), names.end(),
                                        [&](const std::string & name) { return get(name).pipeline != nullptr; });
        return answers[key] = all;
    }

private:
    ggml_metal_library_t library = nullptr;
    std::mutex mutex;
    std::map<int64_t, bool> answers;
};

std::string part_name(int64_t d, int nq) {
    return "kernel_prop_attn_part_d" + std::to_string(d) + "_q" + std::to_string(nq);
}
std::string reduce_name(int64_t d) { return "kernel_prop_attn_reduce_d" + std::to_string(d); }
std::string step_name(int step) { return "kernel_pass_step_" + std::to_string(step); }

ggml_metal_buffer_id buffer_of(const ggml_tensor * t) {
    ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);
}

// A device as gpu/run-attn.h and gpu/run-pass.h want it.
class metal_device {
public:
    metal_device(ggml_metal_device_t dev, ggml_metal_encoder_t enc, const ggml_tensor * dst) :
        kernels(metal_kernels::of(dev)), enc(enc), dst(dst) {}

    static constexpr bool KNOWS_MMA = false;

    int n_block(bool) const { return N_BLOCK; }

    // Behind the result; no address is followed.
    float * attn_work(size_t n) {
        GGML_ASSERT(n * sizeof(float) <= ggml_metal_prop_attn_extra(dst));
        return nullptr;
    }

    template <int D, int NQ>
    void attn_part(int n_part, int n_group, const prop_attn_args & a, const prop_attn_src &, float *) {
        begin(part_name(D, NQ), &a, sizeof(a), prop_attn_shared<D, NQ>::SIZE);
        for (ggml_prop_attn_src i :
            { GGML_PROP_ATTN_Q, GGML_PROP_ATTN_K, GGML_PROP_ATTN_V, GGML_PROP_ATTN_MASK, GGML_PROP_ATTN_CORE_K,
                GGML_PROP_ATTN_CORE_V, GGML_PROP_ATTN_BIAS, GGML_PROP_ATTN_HEADS, GGML_PROP_ATTN_ROWS }) {
            add(dst->src[i]);
        }
        add(work());
        run(n_part, n_group);
    }

    template <int D> void attn_reduce(int n, const prop_attn_args & a, const prop_attn_src &, const float *, float *) {
        begin(reduce_name(D), &a, sizeof(a), 0);
        add(dst->src[GGML_PROP_ATTN_ROWS]);
        add(dst->src[a.has_sinks ? GGML_PROP_ATTN_SINKS : GGML_PROP_ATTN_ROWS]);
        add(work());
        add(dst);
        run(n, 1);
    }

    template <int STEP>
    void pass_step(int n_piece, int n_head, int shared, const pass_dims & m, const semcache::pass_layout::layer & l,
        const pass_data & x, const pass_work & w) {
        begin(step_name(STEP), &m, sizeof(m), std::max(shared, 1));
        for (const ggml_tensor * t : l.a->tensors) {
            add(t);
        }
        const auto & task = *(const semcache::pass_task *) ggml_prop_attn_get_task(dst);
        const ggml_metal_buffer_id memory = buffer_of(task.work_tensor);
        for (const void * p : std::initializer_list<const void *>{ x.q_weight, x.turn, x.back, x.mean_turn, x.cell,
                 x.chunk, x.n_voted, x.voter_row, w.n, w.k }) { // w.k: where the work begins
            add({ memory.metal, memory.offs + (size_t) ((const uint8_t *) p - task.work) });
        }
        run(n_piece, n_head);
    }

private:
    void begin(const std::string & name, const void * args, size_t n_args, size_t shared) {
        ggml_metal_encoder_set_pipeline(enc, kernels.get(name));
        ggml_metal_encoder_set_bytes(enc, const_cast<void *>(args), n_args, 0);
        if (shared) {
            ggml_metal_encoder_set_threadgroup_memory_size(enc, GGML_PAD(shared, SHARED_ALIGNMENT), 0);
        }
        n_arg = 1;
    }
    void add(ggml_metal_buffer_id id) { ggml_metal_encoder_set_buffer(enc, id, n_arg++); }
    void add(const ggml_tensor * t) { add(buffer_of(t)); }

    // Kernels run one after the other, also where the encoder lets them overlap.
    void run(int x, int y) {
        ggml_metal_encoder_dispatch_threadgroups(enc, x, y, 1, SC_THREADS, 1, 1);
        ggml_metal_encoder_memory_barrier(enc);
    }

    ggml_metal_buffer_id work() const {
        ggml_metal_buffer_id id = buffer_of(dst);
        id.offs += ggml_nbytes(dst);
        return id;
    }

    metal_kernels & kernels;
    ggml_metal_encoder_t enc;
    const ggml_tensor * dst;
    int n_arg = 0;
};

} // namespace

bool ggml_metal_prop_attn_supported(ggml_metal_device_t dev, const ggml_tensor * op) {
    if (!semcache::device_supports(op)) {
        return false;
    }
    metal_kernels & kernels = metal_kernels::of(dev);
    if (ggml_prop_attn_get_kind(op) == GGML_PROP_ATTN_PASS) {
        std::vector<std::string> names;
        for (int step = 0; step < N_PASS_STEP; ++step) {
            names.push_back(step_name(step));
        }
        return kernels.have(0, names);
    }
    const int64_t d = semcache::device_head_size(op);
    std::vector<std::string> names{ reduce_name(d) };
    semcache::device_query_rows(d, [&](int nq) { names.push_back(part_name(d, nq)); });
    return kernels.have(d, names);
}

size_t ggml_metal_prop_attn_extra(const ggml_tensor * op) {
    if (ggml_prop_attn_get_kind(op) != GGML_PROP_ATTN_ATTEND) {
        return 0;
    }
    const semcache::attn_args a = semcache::attn_args_of(op);
    size_t n = 0;
    semcache::device_head(semcache::device_head_size(op), semcache::n_query_row(a),
        [&](auto, auto nq) { n = sizeof(float) * semcache::device_grid(a, nq, N_BLOCK).n_work; });
    return n;
}

int ggml_metal_prop_attn(ggml_metal_device_t dev, ggml_metal_encoder_t enc, ggml_tensor * dst) {
    metal_device device(dev, enc, dst);
    if (ggml_prop_attn_get_kind(dst) == GGML_PROP_ATTN_PASS) {
        semcache::device_pass<metal_device>(device, *(const semcache::pass_task *) ggml_prop_attn_get_task(dst)).run();
    } else {
        semcache::device_attend(device, dst);
    }
    return 1;
}
