// semcache-residual.h - what a layer's attention adds to the residual stream, watched while a calibration text is read

#pragma once

#include "ggml.h"

#include <cstdint>
#include <map>
#include <vector>

class semcache_residual {
public:
    // Evaluation callback of a context (ggml_backend_sched_eval_callback); `self` is a semcache_residual.
    static bool observe(ggml_tensor * t, bool ask, void * self);

    // What squared errors of layer il's head outputs are divided by: the size of the residual stream, the median over
    // the tokens seen of the norm of the layer's output (of the nearest layer below that was seen: a last layer is
    // evaluated for outputs only; 0 if none was). Where a norm follows the attention's projection (Gemma 2 and 3, OLMo
    // 2, EXAONE 4, GLM 4), what it makes of an error is in proportion to the outputs' own size: times (median norm of
    // the heads' outputs / that of what the norm returns)^2.
    double size(int32_t il) const;

    void clear() { seen.clear(); }

private:
    struct layer {
        std::vector<float> out, heads,
            normed; // one norm per token: of the layer, of its heads together, of the norm behind them
    };
    std::map<int32_t, layer> seen;
};
