// Metal made of the CPU: what ggml-metal.cpp and ggml-metal-ops.cpp of llama.cpp and native/metal/*.cpp ask of Apple's
// side (ggml-metal-device.m, ggml-metal-context.m). The kernels of native/metal/*.metal run as C++ by the shim, with
// the buffers at the places that the host's side gave them; ggml's own operations are computed by ggml-cpu.

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-metal-context.h"
#include "ggml-metal-device.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-ops.h"
#include "ggml-metal.h"
#include "ggml-prop-attn-metal.h"
#include "ggml-prop-attn.h"
#include "gpu/pass.h"
#include "gpu/prop-attn.h"
#include "memory.h"

#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <vector>

using card::card_memory;
using card::open_memory;

extern const char PROP_ATTN_MSL[];

// What a kernel was given.
struct ggml_metal_encoder {
    std::string kernel;
    std::vector<uint8_t> bytes;
    std::vector<uint8_t *> buffers = std::vector<uint8_t *>(31); // by index, as many as Metal has
    size_t n_shared = 0;
    bool is_shared = false, is_behind_barrier = true;
};

namespace {

// ---- kernels, as functions of C++

struct uint3 {
    uint x, y, z;
};

void expect(bool ok, const char * what) {
    if (!ok) {
        GGML_ABORT("Metal made of the CPU: %s", what);
    }
}

typedef std::function<void(const ggml_metal_encoder &, const sc_tid &, uchar * shared)> kernel_body;
std::map<std::string, kernel_body> & known_kernels() {
    static std::map<std::string, kernel_body> all;
    return all;
}

// Arguments in order: bytes at index 0, buffers from 1 on, memory of the block as the last pointer if it was asked for,
// and who runs.
struct argument_source {
    const ggml_metal_encoder & e;
    const sc_tid & t;
    uchar * shared;
    int n_pointer; // that the kernel has
    int n_buffer = 0, n_number = 0;
};
template <typename T> struct argument;
template <typename T> struct argument<const T &> {
    static const T & of(argument_source & s) {
        expect(s.e.bytes.size() == sizeof(T), "arguments of another size than the kernel's");
        return *(const T *) s.e.bytes.data();
    }
};
template <typename T> struct argument<T *> {
    static T * of(argument_source & s) {
        if (++s.n_buffer == s.n_pointer && s.e.is_shared) {
            return (T *) s.shared;
        }
        expect(s.e.buffers[s.n_buffer] != nullptr, "a buffer that the kernel has was not set");
        return (T *) s.e.buffers[s.n_buffer];
    }
};
template <> struct argument<uint> {
    static uint of(argument_source & s) { return s.t.id; }
};
template <> struct argument<ushort> {
    static ushort of(argument_source & s) { return (ushort) (s.n_number++ == 0 ? s.t.lane : s.t.warp); }
};
template <> struct argument<uint3> {
    static uint3 of(argument_source & s) { return { s.t.x, s.t.y, 0 }; }
};

struct kernel_entry {
    template <typename... P> kernel_entry(const char * name, void (*f)(P...)) {
        known_kernels()[name] = [f](const ggml_metal_encoder & e, const sc_tid & t, uchar * shared) {
            constexpr int n_pointer = (0 + ... + (int) std::is_pointer_v<P>);
            argument_source s{ e, t, shared, n_pointer };
            std::tuple<P...> all{ argument<P>::of(s)... }; // in order, as braces are
            expect(e.buffers[n_pointer + !e.is_shared] == nullptr, "more buffers than the kernel has");
            std::apply(f, all);
        };
    }
};

} // namespace

#define kernel static
#define constant const
#define device
#define half sc_half
#define SC_KERNEL(name, ...) static const kernel_entry entry_##name(#name, &__VA_ARGS__);

#include "metal/pass.metal"
#include "metal/prop-attn.metal"

#undef kernel
#undef constant
#undef device
#undef half

// ---- device

struct ggml_metal_pipeline {
    std::string kernel;
};

struct ggml_metal_library {
    std::string source;
    std::map<std::string, ggml_metal_pipeline> pipelines;
};

struct ggml_metal_device {
    ggml_metal_device_props props = {};
    bool compiles = true;
};

struct ggml_metal_buffer {
    uint8_t * p;
    size_t n;
    bool is_own;
};

struct ggml_metal {
    ggml_metal_device_t dev;
    ggml_backend_t cpu;
};

namespace {

ggml_metal_device the_device;
int64_t n_attended = 0, n_passed = 0; // nodes of each kind that it computed

ggml_metal_pipeline_with_params no_pipeline() { return { nullptr, 0, 0, 0, 0, false, false }; }

} // namespace

extern "C" {

ggml_metal_device_t ggml_metal_device_init(int, int) {
    ggml_metal_device_props & p = the_device.props;
    snprintf(p.name, sizeof(p.name), "MTL0");
    snprintf(p.desc, sizeof(p.desc), "Metal made of the CPU");
    p.max_buffer_size = p.max_working_set_size = card::MEMORY;
    p.max_theadgroup_memory_size = 32 << 10;
    p.has_simdgroup_reduction = p.has_simdgroup_mm = p.has_unified_memory = p.use_shared_buffers = true;
    p.supports_gpu_family_apple7 = true;
    return &the_device;
}
void ggml_metal_device_free(ggml_metal_device_t) {}
const ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t dev) { return &dev->props; }
void ggml_metal_device_get_memory(ggml_metal_device_t, size_t * free, size_t * total) {
    *free = card_memory.most - card_memory.n_bytes;
    *total = card_memory.most;
}
ggml_metal_fusion_info * ggml_metal_device_get_fusion_info(ggml_metal_device_t) { return nullptr; }
ggml_metal_library_t ggml_metal_device_get_library(ggml_metal_device_t) { return nullptr; }
const char * ggml_metal_device_id_token(ggml_metal_device_id) { return "CPU"; }
ggml_metal_event_t ggml_metal_device_event_init(ggml_metal_device_t) { return nullptr; }
void ggml_metal_device_event_free(ggml_metal_device_t, ggml_metal_event_t) {}
void ggml_metal_device_event_synchronize(ggml_metal_device_t, ggml_metal_event_t) {}

bool ggml_metal_device_supports_op(ggml_metal_device_t dev, const ggml_tensor * op) {
    if (op->op == GGML_OP_PROP_ATTN) {
        return ggml_metal_prop_attn_supported(dev, op);
    }
    return ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
}

// ---- memory

ggml_metal_buffer_t ggml_metal_buffer_init(ggml_metal_device_t, size_t size, bool) {
    void * p = card_memory.allocate(size);
    return p ? new ggml_metal_buffer{ (uint8_t *) p, size, true } : nullptr;
}
ggml_metal_buffer_t ggml_metal_buffer_map(ggml_metal_device_t, void * p, size_t size, size_t) {
    return new ggml_metal_buffer{ (uint8_t *) p, size, false }; // weights, in the file's memory
}
void ggml_metal_buffer_free(ggml_metal_buffer_t buf) {
    if (buf->is_own) {
        card_memory.release(buf->p);
    }
    delete buf;
}
void * ggml_metal_buffer_get_base(ggml_metal_buffer_t buf) { return buf->p; }
bool ggml_metal_buffer_is_shared(ggml_metal_buffer_t) { return true; }
void ggml_metal_buffer_memset_tensor(ggml_metal_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t n) {
    const open_memory open;
    memset((uint8_t *) t->data + offset, value, n);
}
void ggml_metal_buffer_set_tensor(ggml_metal_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t n) {
    const open_memory open;
    memcpy((uint8_t *) t->data + offset, data, n);
}
void ggml_metal_buffer_get_tensor(ggml_metal_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t n) {
    const open_memory open;
    memcpy(data, (const uint8_t *) t->data + offset, n);
}
bool ggml_metal_buffer_cpy_tensor(ggml_metal_buffer_t, const ggml_tensor *, ggml_tensor *) { return false; }
void ggml_metal_buffer_clear(ggml_metal_buffer_t buf, uint8_t value) {
    const open_memory open;
    memset(buf->p, value, buf->n);
}
ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t buf, const ggml_tensor * t) {
    const uint8_t * p = (const uint8_t *) t->data;
    expect(p >= buf->p && p + ggml_nbytes(t) <= buf->p + buf->n, "a tensor in another buffer than it says");
    return { buf, (size_t) (p - buf->p) };
}

// ---- libraries

ggml_metal_device_t ggml_metal_library_get_device(ggml_metal_library_t) { return &the_device; }
ggml_metal_library_t ggml_metal_library_init_from_source(ggml_metal_device_t dev, const char * source, bool) {
    return dev->compiles ? new ggml_metal_library{ source, {} } : nullptr;
}
ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    ggml_metal_pipeline_with_params p = no_pipeline();
    const auto known = lib->pipelines.find(name);
    p.pipeline = known == lib->pipelines.end() ? nullptr : &known->second;
    return p;
}
ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(
    ggml_metal_library_t lib, const char * base, const char * name, ggml_metal_cv_t) {
    const std::string host_name = "host_name(\"" + std::string(base) + "\")";
    if (lib->source.find(host_name) != std::string::npos && known_kernels().count(base)) {
        lib->pipelines[name].kernel = base;
    }
    return ggml_metal_library_get_pipeline(lib, name);
}
ggml_metal_pipeline_t ggml_metal_pipeline_init(void) { return nullptr; }
void ggml_metal_pipeline_free(ggml_metal_pipeline_t) {}
int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) { return 1024; }
ggml_metal_cv_t ggml_metal_cv_init(void) { return nullptr; }
void ggml_metal_cv_free(ggml_metal_cv_t) {}
void ggml_metal_cv_set_int16(ggml_metal_cv_t, int16_t, int32_t) {}
void ggml_metal_cv_set_int32(ggml_metal_cv_t, int32_t, int32_t) {}
void ggml_metal_cv_set_bool(ggml_metal_cv_t, bool, int32_t) {}

// ---- encoding, which runs at once

ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t, bool) { return new ggml_metal_encoder; }
void ggml_metal_encoder_free(ggml_metal_encoder_t e) { delete e; }
void ggml_metal_encoder_end_encoding(ggml_metal_encoder_t) {}
void ggml_metal_encoder_debug_group_push(ggml_metal_encoder_t, const char *) {}
void ggml_metal_encoder_debug_group_pop(ggml_metal_encoder_t) {}
void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t e) { e->is_behind_barrier = true; }

// What was set before is forgotten: each kernel is to be given all that it has.
void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t e, ggml_metal_pipeline_with_params p) {
    expect(p.pipeline != nullptr, "no pipeline");
    const bool is_behind_barrier = e->is_behind_barrier;
    *e = {};
    e->kernel = p.pipeline->kernel;
    e->is_behind_barrier = is_behind_barrier;
}
void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t e, void * data, size_t size, int idx) {
    expect(idx == 0 && size <= 4096, "bytes at index 0, 4 KiB at the most");
    e->bytes.assign((uint8_t *) data, (uint8_t *) data + size);
}
void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t e, ggml_metal_buffer_id id, int idx) {
    const ggml_metal_buffer & b = *(ggml_metal_buffer_t) id.metal;
    expect(id.offs < b.n && id.offs % 4 == 0, "a place in its buffer, of whole words");
    e->buffers.at(idx) = b.p + id.offs;
}
void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t e, size_t size, int) {
    expect(size > 0 && size % 16 == 0 && size <= the_device.props.max_theadgroup_memory_size,
        "threadgroup memory of whole 16 bytes that the device has");
    e->n_shared = size;
    e->is_shared = true;
}
void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t e, int x, int y, int z, int n, int ny, int nz) {
    expect(x > 0 && y > 0 && z == 1 && n == SC_THREADS && ny == 1 && nz == 1, "blocks of SC_THREADS");
    expect(e->is_behind_barrier, "a barrier between two kernels");
    e->is_behind_barrier = false;
    const kernel_body & body = known_kernels().at(e->kernel);
    sc_cpu::launch(x, y, n, (int) e->n_shared, [&](const sc_tid & t, uchar * shared) { body(*e, t, shared); });
}

// ---- context

ggml_metal_t ggml_metal_init(ggml_metal_device_t dev) { return new ggml_metal{ dev, ggml_backend_cpu_init() }; }
void ggml_metal_free(ggml_metal_t ctx) {
    ggml_backend_free(ctx->cpu);
    delete ctx;
}
const char * ggml_metal_get_name(ggml_metal_t) { return "MTL0"; }
void ggml_metal_synchronize(ggml_metal_t) {}
void ggml_metal_set_tensor_async(ggml_metal_t, ggml_tensor * t, const void * data, size_t offset, size_t n) {
    ggml_metal_buffer_set_tensor(nullptr, t, data, offset, n);
}
void ggml_metal_get_tensor_async(ggml_metal_t, const ggml_tensor * t, void * data, size_t offset, size_t n) {
    ggml_metal_buffer_get_tensor(nullptr, t, data, offset, n);
}
bool ggml_metal_cpy_tensor_async(ggml_metal_t, ggml_metal_t, const ggml_tensor *, ggml_tensor *) { return false; }
void ggml_metal_event_record(ggml_metal_t, ggml_metal_event_t) {}
void ggml_metal_event_wait(ggml_metal_t, ggml_metal_event_t) {}
void ggml_metal_set_n_cb(ggml_metal_t, int) {}
void ggml_metal_set_abort_callback(ggml_metal_t, ggml_abort_callback, void *) {}
bool ggml_metal_supports_family(ggml_metal_t, int) { return true; }
void ggml_metal_capture_next_compute(ggml_metal_t) {}
void ggml_metal_graph_optimize(ggml_metal_t, ggml_cgraph *) {}

ggml_status ggml_metal_graph_compute(ggml_metal_t ctx, ggml_cgraph * graph) {
    const open_memory open;
    for (int i = 0; i < graph->n_nodes; ++i) {
        const ggml_tensor * node = graph->nodes[i];
        if (node->op == GGML_OP_PROP_ATTN) {
            static ggml_metal_fusion_info * const fusion = ggml_metal_fusion_info_init(true, 0);
            ggml_metal_op_t op = ggml_metal_op_init(ctx->dev, nullptr, graph, fusion, i, i + 1, true, false, 0);
            expect(ggml_metal_op_encode(op, 0) == 1, "one node encoded");
            ggml_metal_op_free(op);
            ++(ggml_prop_attn_get_kind(node) == GGML_PROP_ATTN_PASS ? n_passed : n_attended);
            continue;
        }
        ggml_cgraph one = ggml_graph_view(graph, i, i + 1);
        const ggml_status status = ggml_backend_graph_compute(ctx->cpu, &one);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    return GGML_STATUS_SUCCESS;
}

// ---- what tests set and see

// So many bytes; compiles: else no kernel does.
void metal_set(size_t n_bytes, bool compiles) {
    card_memory.most = n_bytes;
    the_device.compiles = compiles;
}
size_t metal_allocated() { return card_memory.n_bytes; }
int64_t metal_attended() { return n_attended; }
int64_t metal_passed() { return n_passed; }
}
