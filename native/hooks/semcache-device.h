// semcache-device.h - what a device computes of a compressed cache

#pragma once

#include "ggml-backend.h"

#include <cstdint>

struct llama_hparams;
struct semcache_params;

// Attention over the cores of layer il.
bool semcache_device_attends(
    ggml_backend_dev_t dev, const llama_hparams & hparams, uint32_t il, const semcache_params & params);

// Passes by the method that is set, over n_work bytes of its memory. Where a device has attention alone, its rows are
// copied to the host for a pass.
bool semcache_device_passes(ggml_backend_dev_t dev, const semcache_params & params, int64_t n_work);
