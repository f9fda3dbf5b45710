#include "ggml-prop-attn-cpu.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "ggml-prop-attn.h"
#include "pass/task.h"
#include "sc-attn.h"

#include <new>

using semcache::f16;

namespace {

semcache::row_type type_of(const ggml_tensor * t) {
    switch (t->type) {
        case GGML_TYPE_F16: return semcache::row_type::f16;
        case GGML_TYPE_Q8_0: return semcache::row_type::q8_0;
        case GGML_TYPE_Q5_0: return semcache::row_type::q5_0;
        case GGML_TYPE_Q4_0: return semcache::row_type::q4_0;
        case GGML_TYPE_IQ4_NL: return semcache::row_type::iq4_nl;
        default: GGML_ABORT("rows of type %s", ggml_type_name(t->type)); // ggml_prop_attn() has refused it
    }
}

semcache::attn_args args_of(const ggml_tensor * dst) {
    const ggml_tensor *q = dst->src[GGML_PROP_ATTN_Q], *k = dst->src[GGML_PROP_ATTN_K], *v = dst->src[GGML_PROP_ATTN_V];
    const ggml_tensor *mask = dst->src[GGML_PROP_ATTN_MASK], *rows = dst->src[GGML_PROP_ATTN_ROWS],
                      *heads = dst->src[GGML_PROP_ATTN_HEADS], *sinks = dst->src[GGML_PROP_ATTN_SINKS];
    const ggml_tensor *core_k = dst->src[GGML_PROP_ATTN_CORE_K], *core_v = dst->src[GGML_PROP_ATTN_CORE_V];
    const bool v_trans = v->nb[1] > v->nb[2];
    semcache::attn_args a = {};
    a.n_embd_head_k = (int32_t) q->ne[0];
    a.n_embd_head_v = (int32_t) core_v->ne[0];
    a.n_head = (int32_t) q->ne[1];
    a.n_head_kv = (int32_t) k->ne[1];
    a.n_tokens = (int32_t) q->ne[2];
    a.n_kv = (int32_t) k->ne[2];
    a.scale = ggml_get_op_params_f32(dst, 1);
    a.softcap = ggml_get_op_params_f32(dst, 2);
    a.k_rotated = ggml_get_op_params_i32(dst, 3) != 0;
    a.q = (const float *) q->data;
    a.q_head = q->nb[1] / sizeof(float);
    a.q_token = q->nb[2] / sizeof(float);
    a.k = (const uint8_t *) k->data;
    a.k_cell_type = type_of(k);
    a.k_head = k->nb[1];
    a.k_cell = k->nb[2];
    a.v = (const uint8_t *) v->data;
    a.v_cell_type = type_of(v);
    a.v_head = v->nb[1];
    a.v_cell = v_trans ? sizeof(f16) : v->nb[2];
    a.v_elem = v_trans ? v->nb[2] : sizeof(f16);
    a.mask = mask->data;
    a.mask_f16 = mask->type == GGML_TYPE_F16;
    a.mask_token = mask->nb[1] / ggml_type_size(mask->type);
    a.sinks = sinks ? (const float *) sinks->data : nullptr;
    a.k_core = (const uint8_t *) core_k->data;
    a.k_type = type_of(core_k);
    a.v_core = (const uint8_t *) core_v->data;
    a.v_type = type_of(core_v);
    a.bias = (const f16 *) dst->src[GGML_PROP_ATTN_BIAS]->data;
    a.n_row = (int32_t) core_k->ne[1];
    a.row_first = (const int32_t *) rows->data;
    a.row_count = (const int32_t *) rows->data + a.n_head_kv;
    a.heads = (const f16 *) heads->data;
    a.n_sink = (int32_t) ggml_prop_attn_n_sink(a.n_embd_head_k, a.n_embd_head_v, heads);
    return a;
}

void attend(const ggml_compute_params * params, ggml_tensor * dst) {
    const semcache::attn_args a = args_of(dst);
    float * work = (float *) params->wdata;
    float * out = (float *) dst->data;
    GGML_ASSERT(params->wsize >= ggml_prop_attn_work_size(dst, params->nth));

    semcache::attn_part(a, work, out, params->ith, params->nth);
    if (semcache::attn_in_parts(a)) {
        ggml_barrier(params->threadpool);
        semcache::attn_reduce(a, work, out, params->ith, params->nth);
    }
}

// Calls f(job) for every job: thread i begins with the i-th, and whoever is free takes the next.
template <typename F> void for_jobs(const ggml_compute_params * params, int32_t n_job, F && f) {
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (int32_t i = params->ith; i < n_job; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        f(i);
    }
}

template <typename T> const T & task_of(const ggml_tensor * dst) { return *(const T *) ggml_prop_attn_get_task(dst); }

void pass(const ggml_compute_params * params, const ggml_tensor * dst) {
    const auto & task = task_of<semcache::pass_task>(dst);
    for_jobs(params, task.n_job, [&](int32_t i) {
        const semcache::pass_job & job = task.jobs[i];
        task.results[i] = semcache::compress_head(*job.layer, *task.plan, job.ih, task.scratch[params->ith]);
    });
}

void calibrate(const ggml_compute_params * params, const ggml_tensor * dst) {
    const auto & task = task_of<semcache::calibrate_task>(dst);
    for_jobs(params, task.n_job, [&](int32_t i) {
        try {
            task.errors[i] = semcache::output_errors(*task.jobs[i].text, task.jobs[i].ih, *task.params, *task.parts);
        } catch (const std::bad_alloc &) {
            *task.failed = true;
        }
    });
}

} // namespace

size_t ggml_prop_attn_work_size(const ggml_tensor * dst, int n_tasks) {
    const bool attends = ggml_prop_attn_get_kind(dst) == GGML_PROP_ATTN_ATTEND;
    return attends ? sizeof(float) * semcache::attn_work_size(args_of(dst), n_tasks) : 0;
}

void ggml_compute_forward_prop_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    switch (ggml_prop_attn_get_kind(dst)) {
        case GGML_PROP_ATTN_ATTEND: attend(params, dst); break;
        case GGML_PROP_ATTN_PASS: pass(params, dst); break;
        case GGML_PROP_ATTN_CALIBRATE: calibrate(params, dst); break;
    }
}
