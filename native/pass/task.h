// task.h - what one node of a graph does for all kv heads of a backend

#pragma once

#include "calibrate.h"
#include "pass.h"

#include <atomic>

namespace semcache {

struct pass_job {
    const pass_args * layer;
    int32_t ih;
    int32_t n_used, n_alloc; // the head's rows, as the host knows them
};

// A head is never split between threads, so that sums keep their order. Thread i takes no job before the i-th.
struct pass_task {
    const pass_plan * plan;
    const pass_job * jobs; // [n_job] the largest first
    int32_t n_job;
    uint8_t * const * scratch; // [n_thread] for each thread's largest job; of the CPU's
    pass_result * results;     // [n_job] of the CPU's

    // Of a device's: its memory [n_work] with what gpu/pass-layout.h lays there, and the tensor that it belongs to.
    uint8_t * work;
    int64_t n_work;
    const ggml_tensor * work_tensor;
};

struct calibrate_job {
    const calibrate_text * text;
    int32_t ih;
};

struct calibrate_task {
    const calibrate_params * params;
    const std::vector<double> * parts;
    const calibrate_job * jobs;
    int32_t n_job;
    std::vector<double> * errors; // [n_job] of each part
    std::atomic<bool> * failed;   // for want of memory
};

} // namespace semcache
