#include "semcache-residual.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

namespace {

// Whether t = RMS norm of a projection, times weights: nothing was added between the attention and the norm. Other
// models have norms of the same name behind the addition.
bool normalizes_projection(const ggml_tensor * t) {
    if (t->op != GGML_OP_MUL || t->src[0]->op != GGML_OP_RMS_NORM) {
        return false;
    }
    const ggml_tensor * x = t->src[0]->src[0];
    while (x->op == GGML_OP_MUL || x->op == GGML_OP_GET_ROWS ||
           (x->op == GGML_OP_ADD && x->src[1]->op == GGML_OP_NONE)) { // a scale, outputs only, a bias
        x = x->src[0];
    }
    return x->op == GGML_OP_MUL_MAT;
}

double median(std::vector<float> x) {
    std::nth_element(x.begin(), x.begin() + x.size() / 2, x.end());
    return x[x.size() / 2];
}

} // namespace

bool semcache_residual::observe(ggml_tensor * t, bool ask, void * self) {
    char name[GGML_MAX_NAME];
    int il;
    char rest;
    if (t->type != GGML_TYPE_F32 || sscanf(ggml_get_name(t), "%63[a-z_]-%d%c", name, &il, &rest) != 2) {
        return !ask;
    }
    std::vector<float> layer::* to = nullptr;
    if (!strcmp(name, "l_out")) {
        to = &layer::out;
    } else if (!strcmp(name, "kqv_out")) {
        to = &layer::heads;
    } else if ((!strcmp(name, "attn_post_norm") || !strcmp(name, "post_attn_norm")) && normalizes_projection(t)) {
        to = &layer::normed;
    }
    if (ask || !to) {
        return to || !ask;
    }
    std::vector<float> x(ggml_nelements(t));
    ggml_backend_tensor_get(t, x.data(), 0, ggml_nbytes(t));
    for (auto row = x.begin(); row != x.end(); row += t->ne[0]) {
        double sum = 0.0;
        for (auto i = row; i != row + t->ne[0]; ++i) {
            sum += (double) *i * *i;
        }
        (((semcache_residual *) self)->seen[il].*to).push_back((float) std::sqrt(sum));
    }
    return true;
}

double semcache_residual::size(int32_t il) const {
    double gain = 1.0;
    if (const auto at = seen.find(il); at != seen.end() && !at->second.heads.empty() && !at->second.normed.empty()) {
        gain = median(at->second.normed) / median(at->second.heads);
    }
    for (auto it = seen.upper_bound(il); it != seen.begin();) {
        if (!(--it)->second.out.empty()) {
            return median(it->second.out) / (gain * gain);
        }
    }
    return 0.0;
}
