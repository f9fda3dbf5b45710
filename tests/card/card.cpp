// A card made of the CPU: a backend whose memory nobody else may touch, which computes ggml's own operations by
// ggml-cpu and ours by the kernels of native/gpu. It takes the way that a real card takes through llama.cpp, the
// scheduler and native/hooks.

#include "gpu/prop-attn-many.h"
#include "gpu/run-attn.h"
#include "gpu/run-pass.h"
#include "shim-device.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "memory.h"

#include <cstring>

namespace {

using card::card_memory;
using card::open_memory;

extern ggml_backend_device device;

// ---- memory

const char * buft_name(ggml_backend_buffer_type_t) { return "Card"; }
size_t buft_alignment(ggml_backend_buffer_type_t) { return 128; }

const ggml_backend_buffer_i buffer_interface = {
    /* .free_buffer   = */ [](ggml_backend_buffer_t b) { card_memory.release(b->context); },
    /* .get_base      = */ [](ggml_backend_buffer_t b) { return b->context; },
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */
    [](ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t n) {
        const open_memory open;
        memset((uint8_t *) t->data + offset, value, n);
    },
    /* .set_tensor    = */
    [](ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t n) {
        const open_memory open;
        memcpy((uint8_t *) t->data + offset, data, n);
    },
    /* .get_tensor    = */
    [](ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t n) {
        const open_memory open;
        memcpy(data, (const uint8_t *) t->data + offset, n);
    },
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */
    [](ggml_backend_buffer_t b, uint8_t value) {
        const open_memory open;
        memset(b->context, value, b->size);
    },
    /* .reset         = */ nullptr,
};

ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t buft, size_t n) {
    void * p = card_memory.allocate(n);
    return p ? ggml_backend_buffer_init(buft, buffer_interface, p, n) : nullptr;
}

ggml_backend_buffer_type buffer_type = { { buft_name, buft_alloc, buft_alignment, nullptr, nullptr, nullptr }, &device,
    nullptr };

// ---- computing

bool has_matrix_units = false;

// As run-attn.h wants it: few blocks, since each is a hundred fibers.
class card_device : public sc_test::shim_device {
public:
    int n_block(bool) const { return 4; }

    static constexpr bool KNOWS_MMA = true;
    bool has_mma() const { return has_matrix_units; }

    float * attn_work(size_t n) {
        work.assign(n, NAN);
        return work.data();
    }

    template <int D, int NQ>
    void attn_part(int n_part, int n_group, const prop_attn_args & a, const prop_attn_src & x, float * w) {
        sc_cpu::launch(n_part, n_group, SC_THREADS, prop_attn_shared<D, NQ>::SIZE,
            [&](const sc_tid & t, uchar * sh) { prop_attn_part<D, NQ>(t, a, x, w, sh); });
    }

    template <int D>
    void attn_many_part(int n_part, int n_group, const prop_attn_args & a, const prop_attn_src & x, float * w) {
        sc_cpu::launch(n_part, n_group, SC_THREADS, prop_attn_many_shared<D>::SIZE,
            [&](const sc_tid & t, uchar * sh) { prop_attn_many_part<D>(t, a, x, w, sh); });
    }

    template <int D>
    void attn_reduce(int n, const prop_attn_args & a, const prop_attn_src & x, const float * w, float * dst) {
        sc_cpu::launch(n, 1, SC_THREADS, 0,
            [&](const sc_tid & t, uchar *) { prop_attn_reduce<D>(t, a, x.rows, x.sinks, w, dst); });
    }

private:
    std::vector<float> work;
};

bool loses_passes = false;
int64_t n_attended = 0, n_passed = 0; // nodes of each kind that it computed
int64_t most_work = INT64_MAX;        // that it computes passes over

void compute_ours(ggml_tensor * node) {
    card_device dev;
    if (ggml_prop_attn_get_kind(node) == GGML_PROP_ATTN_PASS) {
        const auto & task = *(const semcache::pass_task *) ggml_prop_attn_get_task(node);
        if (!loses_passes) {
            semcache::device_pass<card_device>(dev, task).run();
        }
        ++n_passed;
    } else {
        semcache::device_attend(dev, node);
        ++n_attended;
    }
}

ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    const open_memory open;
    ggml_backend_t cpu = (ggml_backend_t) backend->context;
    int begin = 0;
    for (int i = 0; i <= graph->n_nodes; ++i) {
        const bool ours = i < graph->n_nodes && graph->nodes[i]->op == GGML_OP_PROP_ATTN;
        if (i < graph->n_nodes && !ours) {
            continue;
        }
        if (i > begin) {
            ggml_cgraph view = ggml_graph_view(graph, begin, i);
            const ggml_status status = ggml_backend_graph_compute(cpu, &view);
            if (status != GGML_STATUS_SUCCESS) {
                return status;
            }
        }
        if (ours) {
            compute_ours(graph->nodes[i]);
        }
        begin = i + 1;
    }
    return GGML_STATUS_SUCCESS;
}

ggml_guid guid = { 0x53, 0x43, 0x43, 0x41, 0x52, 0x44 };

ggml_backend_t init_backend(ggml_backend_dev_t dev, const char *) {
    ggml_backend_i i = {};
    i.get_name = [](ggml_backend_t) { return "Card"; };
    i.free = [](ggml_backend_t b) {
        ggml_backend_free((ggml_backend_t) b->context);
        delete b;
    };
    i.graph_compute = compute;
    return new ggml_backend{ &guid, i, dev, ggml_backend_cpu_init() };
}

bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    if (op->op == GGML_OP_PROP_ATTN) {
        return semcache::device_supports(op) &&
               (ggml_prop_attn_get_kind(op) != GGML_PROP_ATTN_PASS ||
                   ((const semcache::pass_task *) ggml_prop_attn_get_task(op))->n_work <= most_work);
    }
    return ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
}

const ggml_backend_device_i device_interface = {
    /* .get_name             = */ [](ggml_backend_dev_t) { return "Card0"; },
    /* .get_description      = */ [](ggml_backend_dev_t) { return "a card made of the CPU"; },
    /* .get_memory           = */
    [](ggml_backend_dev_t, size_t * free, size_t * total) {
        *free = card_memory.most - card_memory.n_bytes;
        *total = card_memory.most;
    },
    /* .get_type             = */ [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; },
    /* .get_props            = */
    [](ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
        *props = {};
        props->name = ggml_backend_dev_name(dev);
        props->description = ggml_backend_dev_description(dev);
        props->type = GGML_BACKEND_DEVICE_TYPE_GPU;
        ggml_backend_dev_memory(dev, &props->memory_free, &props->memory_total);
    },
    /* .init_backend         = */ init_backend,
    /* .get_buffer_type      = */ [](ggml_backend_dev_t) { return &buffer_type; },
    /* .get_host_buffer_type = */ nullptr,
    /* .buffer_from_host_ptr = */ nullptr,
    /* .supports_op          = */ supports_op,
    /* .supports_buft        = */ [](ggml_backend_dev_t, ggml_backend_buffer_type_t b) { return b == &buffer_type; },
    /* .offload_op           = */ nullptr,
    /* .event_new            = */ nullptr,
    /* .event_free           = */ nullptr,
    /* .event_synchronize    = */ nullptr,
};

ggml_backend_reg reg = { GGML_BACKEND_API_VERSION,
    {
        /* .get_name         = */ [](ggml_backend_reg_t) { return "Card"; },
        /* .get_device_count = */ [](ggml_backend_reg_t) { return (size_t) 1; },
        /* .get_device       = */ [](ggml_backend_reg_t, size_t) { return &device; },
        /* .get_proc_address = */ nullptr,
    },
    nullptr };

ggml_backend_device device = { device_interface, &reg, nullptr };

} // namespace

extern "C" {

// As other backends: names itself, to be registered before a model is loaded.
ggml_backend_reg_t card_reg() { return &reg; }

// So many bytes; kernels for passes that work in no more than most_pass_work of them, none if negative; matrix units.
void card_set(size_t n_bytes, int64_t most_pass_work, bool with_matrix_units) {
    card_memory.most = n_bytes;
    most_work = most_pass_work;
    has_matrix_units = with_matrix_units;
}

// Passes are not computed, and nothing is said: as on a device whose driver stops what takes too long.
void card_lose_passes() { loses_passes = true; }

size_t card_allocated() { return card_memory.n_bytes; }
int64_t card_attended() { return n_attended; }
int64_t card_passed() { return n_passed; }
}
