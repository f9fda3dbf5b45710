#include "ggml-prop-attn-cpu.h"

#include "ggml-cpu-impl.h"
#include "ggml-prop-attn-args.h"
#include "ggml-prop-attn.h"
#include "pass/task.h"
#include "sc-attn.h"

#include <new>

namespace {

void attend(const ggml_compute_params * params, ggml_tensor * dst) {
    const semcache::attn_args a = semcache::attn_args_of(dst);
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
    return attends ? sizeof(float) * semcache::attn_work_size(semcache::attn_args_of(dst), n_tasks) : 0;
}

void ggml_compute_forward_prop_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    switch (ggml_prop_attn_get_kind(dst)) {
        case GGML_PROP_ATTN_ATTEND: attend(params, dst); break;
        case GGML_PROP_ATTN_PASS: pass(params, dst); break;
        case GGML_PROP_ATTN_CALIBRATE: calibrate(params, dst); break;
    }
}
