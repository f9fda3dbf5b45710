#include "semcache-device.h"

#include "ggml-cpp.h"
#include "ggml-prop-attn.h"
#include "llama-hparams.h"
#include "pass/task.h"
#include "semcache-error.h"
#include "semcache.h"

bool semcache_device_attends(ggml_backend_dev_t dev, const llama_hparams & h, uint32_t il, const semcache_params & p) {
    const ggml_context_ptr ctx(ggml_init({ 12 * ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }));
    if (!ctx) {
        throw semcache_error(
            SEMCACHE_ERR_MEMORY, "compressed KV cache: expected room to describe its attention, got none; free memory");
    }
    const int64_t n_k = h.n_embd_head_k(il), n_v = h.n_embd_head_v(il), n_head = h.n_head(il),
                  n_head_kv = h.n_head_kv(il), n = 256;
    const auto tensor = [&](int32_t type, int64_t ne0, int64_t ne1, int64_t ne2) {
        return ggml_new_tensor_3d(ctx.get(), (ggml_type) type, ne0, ne1, ne2);
    };
    const ggml_tensor * op =
        ggml_prop_attn(ctx.get(), tensor(GGML_TYPE_F32, n_k, n_head, n), tensor(p.type_stage, n_k, n_head_kv, n),
            tensor(p.type_stage, n_v, n_head_kv, n), tensor(GGML_TYPE_F16, n, n, 1), tensor(p.type_k, n_k, n, 1),
            tensor(p.type_v, n_v, n, 1), tensor(GGML_TYPE_F16, n, 1, 1), tensor(GGML_TYPE_I32, n_head_kv, 2, 1),
            tensor(GGML_TYPE_F16, semcache::head_size(n_k, n_v, p.n_sink), n_head_kv, 1), nullptr, 1.0f, 0.0f, false);
    return ggml_backend_dev_supports_op(dev, op);
}

bool semcache_device_passes(ggml_backend_dev_t dev, const semcache_params & p, int64_t n_work) {
    const ggml_context_ptr ctx(ggml_init({ 4 * ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }));
    semcache::pass_plan plan = {};
    plan.how = (semcache::method) p.method;
    semcache::pass_task task = {};
    task.plan = &plan;
    task.n_work = n_work;
    return ctx && ggml_backend_dev_supports_op(dev, ggml_prop_attn_task(ctx.get(), GGML_PROP_ATTN_PASS, &task,
                                                        ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, 1), 0));
}
