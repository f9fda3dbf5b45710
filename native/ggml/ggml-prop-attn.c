#include "ggml-prop-attn.h"

#include "ggml-impl.h"

#include <string.h>

static bool is_cell_type(enum ggml_type type) { return type == GGML_TYPE_F16 || type == GGML_TYPE_Q8_0; }

static bool is_core_type(enum ggml_type type) {
    return is_cell_type(type) || type == GGML_TYPE_Q5_0 || type == GGML_TYPE_Q4_0 || type == GGML_TYPE_IQ4_NL;
}

int64_t ggml_prop_attn_n_sink(int64_t n_embd_head_k, int64_t n_embd_head_v, const struct ggml_tensor * heads) {
    return (heads->ne[0] - 2 * n_embd_head_k) / (n_embd_head_k + n_embd_head_v);
}

struct ggml_tensor * ggml_prop_attn(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
    struct ggml_tensor * v, struct ggml_tensor * mask, struct ggml_tensor * core_k, struct ggml_tensor * core_v,
    struct ggml_tensor * bias, struct ggml_tensor * rows, struct ggml_tensor * heads, struct ggml_tensor * sinks,
    float scale, float softcap, bool k_rotated) {
    const bool v_trans = v->nb[1] > v->nb[2];
    const int64_t n_embd_head_k = q->ne[0];
    const int64_t n_embd_head_v = core_v->ne[0];
    const int64_t n_head = q->ne[1];
    const int64_t n_head_kv = k->ne[1];
    const int64_t n_tokens = q->ne[2];
    const int64_t n_kv = k->ne[2];
    const int64_t n_row = core_k->ne[1];

    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[3] == 1);
    GGML_ASSERT(
        is_cell_type(k->type) && k->nb[0] == ggml_type_size(k->type) && k->ne[0] == n_embd_head_k && k->ne[3] == 1);
    GGML_ASSERT(is_cell_type(v->type) && v->nb[0] == ggml_type_size(v->type) && v->ne[1] == n_head_kv && v->ne[3] == 1);
    GGML_ASSERT(v_trans ? v->type == GGML_TYPE_F16 && v->ne[0] == n_kv && v->ne[2] == n_embd_head_v
                        : v->ne[0] == n_embd_head_v && v->ne[2] == n_kv);
    GGML_ASSERT(mask->type == GGML_TYPE_F16 || mask->type == GGML_TYPE_F32);
    GGML_ASSERT(mask->ne[0] == n_kv && mask->ne[1] >= n_tokens && mask->nb[0] == ggml_type_size(mask->type));
    GGML_ASSERT(n_head % n_head_kv == 0);
    GGML_ASSERT(is_core_type(core_k->type) && core_k->ne[0] == n_embd_head_k && ggml_is_contiguous(core_k));
    GGML_ASSERT(is_core_type(core_v->type) && core_v->ne[1] == n_row && ggml_is_contiguous(core_v));
    GGML_ASSERT(bias->type == GGML_TYPE_F16 && bias->ne[0] == n_row && ggml_is_contiguous(bias));
    GGML_ASSERT(
        rows->type == GGML_TYPE_I32 && rows->ne[0] == n_head_kv && rows->ne[1] == 2 && ggml_is_contiguous(rows));
    GGML_ASSERT(heads->type == GGML_TYPE_F16 && heads->ne[1] == n_head_kv && ggml_is_contiguous(heads));
    GGML_ASSERT(
        heads->ne[0] >= 2 * n_embd_head_k && (heads->ne[0] - 2 * n_embd_head_k) % (n_embd_head_k + n_embd_head_v) == 0);
    GGML_ASSERT(!sinks || (sinks->type == GGML_TYPE_F32 && sinks->ne[0] == n_head && ggml_is_contiguous(sinks)));

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd_head_v * n_head, n_tokens);

    ggml_set_op_params_i32(result, 0, GGML_PROP_ATTN_ATTEND);
    ggml_set_op_params_f32(result, 1, scale);
    ggml_set_op_params_f32(result, 2, softcap);
    ggml_set_op_params_i32(result, 3, k_rotated);

    result->op = GGML_OP_PROP_ATTN;
    result->src[GGML_PROP_ATTN_Q] = q;
    result->src[GGML_PROP_ATTN_K] = k;
    result->src[GGML_PROP_ATTN_V] = v;
    result->src[GGML_PROP_ATTN_MASK] = mask;
    result->src[GGML_PROP_ATTN_CORE_K] = core_k;
    result->src[GGML_PROP_ATTN_CORE_V] = core_v;
    result->src[GGML_PROP_ATTN_BIAS] = bias;
    result->src[GGML_PROP_ATTN_ROWS] = rows;
    result->src[GGML_PROP_ATTN_HEADS] = heads;
    result->src[GGML_PROP_ATTN_SINKS] = sinks;
    return result;
}

// Of a task's parameters, where the pointer to it begins.
#define TASK_AT (2 * sizeof(int32_t))

struct ggml_tensor * ggml_prop_attn_task(struct ggml_context * ctx, enum ggml_prop_attn_kind kind, const void * task,
    struct ggml_tensor * rows, int32_t serial) {
    struct ggml_tensor * result = ggml_view_tensor(ctx, rows);
    GGML_ASSERT(kind != GGML_PROP_ATTN_ATTEND);
    ggml_set_op_params_i32(result, 0, kind);
    ggml_set_op_params_i32(result, 1, serial);
    memcpy((char *) result->op_params + TASK_AT, &task, sizeof(task));
    result->op = GGML_OP_PROP_ATTN;
    return result;
}

const void * ggml_prop_attn_get_task(const struct ggml_tensor * dst) {
    const void * task;
    memcpy(&task, (const char *) dst->op_params + TASK_AT, sizeof(task));
    return task;
}

enum ggml_prop_attn_kind ggml_prop_attn_get_kind(const struct ggml_tensor * dst) {
    return (enum ggml_prop_attn_kind) ggml_get_op_params_i32(dst, 0);
}
