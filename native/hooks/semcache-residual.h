// semcache-residual.h - the size of the residual stream, watched while a calibration text is read

#pragma once

#include "ggml.h"

#include <cstdint>
#include <map>
#include <vector>

class semcache_residual {
public:
    // Evaluation callback of a context (ggml_backend_sched_eval_callback); `self` is a semcache_residual.
    static bool observe(ggml_tensor * t, bool ask, void * self);

    // Median over the tokens seen of the norm of layer il's output; of the nearest layer below that was seen (a last layer is
    // evaluated for outputs only); 0 if none was.
    double size(int32_t il) const;

    void clear() { norms.clear(); }

private:
    std::map<int32_t, std::vector<float>> norms; // by layer, one per token
};
