// semcache-api.cpp - the C API of semcache.h

#include "ggml-row-type.h"
#include "gpu/pass-dims.h"
#include "llama-context.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "semcache-device.h"
#include "semcache-parts.h"

#include <algorithm>
#include <new>

namespace {

struct thread_state {
    std::unique_ptr<semcache_config> pending;
    semcache_status status = SEMCACHE_OK;
    std::string message;
};

thread_state & state() {
    static thread_local thread_state s;
    return s;
}

// Runs f; an exception becomes the thread's last error and its status.
template <typename F> semcache_status guarded(F && f) {
    try {
        f();
        return SEMCACHE_OK;
    } catch (const semcache_error &) {
        // has set itself
    } catch (const std::bad_alloc &) {
        semcache_set_error(SEMCACHE_ERR_MEMORY, "expected memory, got none; free some and try again");
    } catch (const std::exception & e) {
        semcache_set_error(SEMCACHE_ERR_STATE, e.what());
    }
    return state().status;
}

// The number that f returns, or minus its status.
template <typename F> int64_t counted(F && f) {
    int64_t res = 0;
    const semcache_status status = guarded([&] { res = f(); });
    return status == SEMCACHE_OK ? res : -status;
}

void expect(bool ok, const std::string & name, const std::string & range, const std::string & got) {
    if (!ok) {
        throw semcache_error(
            SEMCACHE_ERR_ARGUMENT, name + ": expected " + range + ", got " + got + "; pass a value in that range");
    }
}

llama_semcache::parts & parts_of(const llama_context * ctx) {
    llama_semcache * s = ctx ? semcache_find(ctx->get_memory()) : nullptr;
    if (!s) {
        throw semcache_error(SEMCACHE_ERR_CONTEXT, "expected a context with a compressed KV cache, got one without; "
                                                   "call semcache_configure_next before llama_init_from_model");
    }
    return s->own();
}

} // namespace

void semcache_set_error(semcache_status status, const std::string & message) {
    state().status = status;
    state().message = message;
}

std::unique_ptr<semcache_config> semcache_take_pending() { return std::move(state().pending); }

semcache_params semcache_default_params(void) {
    semcache_params p = {};
    p.struct_size = sizeof(p);
    p.method = SEMCACHE_METHOD_SEMANTIC;
    p.ratio = 0.25f;
    p.n_stage = 384;
    p.n_window = 256;
    p.n_sink = 4;
    p.n_horizon = 512;
    p.n_chunk = 32;
    p.type_k = SEMCACHE_TYPE_AUTO;
    p.type_v = SEMCACHE_TYPE_AUTO;
    p.type_stage = SEMCACHE_TYPE_AUTO;
    p.merge = 1;
    p.distinct = semcache::DISTINCT;
    return p;
}

int32_t semcache_configure_next(const semcache_params * params) {
    state().pending.reset();
    semcache_set_error(SEMCACHE_OK, "");
    if (!params) {
        return SEMCACHE_OK;
    }
    return guarded([&] {
        const auto & p = *params;
        auto num = [](auto x) { return std::to_string(x); };
        expect(p.struct_size == sizeof(p), "struct_size", num(sizeof(p)), num(p.struct_size));
        expect(p.method >= SEMCACHE_METHOD_SEMANTIC && p.method <= SEMCACHE_METHOD_H2O, "method", "a semcache_method",
            num(p.method));
        expect(p.ratio > 0.0f && p.ratio <= 1.0f, "ratio", "0 < ratio <= 1", num(p.ratio));
        expect(p.n_window >= 1, "n_window", "at least 1", num(p.n_window));
        expect(p.n_sink >= 0, "n_sink", "at least 0", num(p.n_sink));
        expect(p.n_stage > (int64_t) p.n_window + p.n_sink, "n_stage",
            "more than n_window + n_sink = " + num((int64_t) p.n_window + p.n_sink), num(p.n_stage));
        expect(p.calibrate || p.n_stage - p.n_window <= SEMCACHE_MAX_ROOM, "n_stage",
            "at most n_window + " + num(SEMCACHE_MAX_ROOM), num(p.n_stage));
        expect(p.n_horizon >= 1, "n_horizon", "at least 1", num(p.n_horizon));
        expect(p.distinct >= 0 && p.distinct <= 100, "distinct", "0 to 100", num(p.distinct));
        expect(p.n_chunk >= 1 && p.n_chunk <= 255, "n_chunk", "1 to 255", num(p.n_chunk));

        const std::vector<int32_t> cells = { SEMCACHE_TYPE_AUTO, GGML_TYPE_F16, GGML_TYPE_Q8_0 };
        std::vector<int32_t> rows = cells;
        rows.insert(rows.end(), { GGML_TYPE_Q5_0, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL });
        auto expect_type = [&](const char * name, int32_t type, const std::vector<int32_t> & known, const char * what) {
            expect(std::find(known.begin(), known.end(), type) != known.end(), name, what, num(type));
        };
        const char * of_rows = "SEMCACHE_TYPE_AUTO, GGML_TYPE_F16, _Q8_0, _Q5_0, _Q4_0 or _IQ4_NL";
        expect_type("type_k", p.type_k, rows, of_rows);
        expect_type("type_v", p.type_v, rows, of_rows);
        expect_type("type_stage", p.type_stage, cells, "SEMCACHE_TYPE_AUTO, GGML_TYPE_F16 or _Q8_0");

        auto c = std::make_unique<semcache_config>();
        c->params = p;
        if (p.profile_path) {
            c->profile_path = p.profile_path;
            std::string error;
            if (!c->profile.read(c->profile_path, error)) {
                throw semcache_error(SEMCACHE_ERR_PROFILE, error);
            }
            if (p.model_id && c->profile.model_id != p.model_id) {
                throw semcache_error(SEMCACHE_ERR_PROFILE, "profile " + c->profile_path + ": expected model " +
                                                               p.model_id + ", got " + c->profile.model_id +
                                                               "; calibrate this model or pass its own profile");
            }
        }
        c->params.profile_path = nullptr; // the caller's strings may go
        c->params.model_id = nullptr;
        state().pending = std::move(c);
    });
}

const char * semcache_last_error(void) { return state().message.c_str(); }

int32_t semcache_last_status(void) { return state().status; }

int32_t semcache_get_stats(const llama_context * ctx, semcache_stats * stats) {
    return guarded([&] {
        expect(stats, "stats", "a place to write to", "NULL");
        parts_of(ctx).stats(*stats);
    });
}

int64_t semcache_kv_bytes(const llama_context * ctx) {
    if (!ctx || !ctx->get_memory()) {
        semcache_set_error(
            SEMCACHE_ERR_CONTEXT, "expected a context with a KV cache, got none; pass one of a generating model");
        return -SEMCACHE_ERR_CONTEXT;
    }
    return counted([&] {
        int64_t res = 0;
        for (const auto & [buft, size] : ctx->get_memory()->memory_breakdown()) {
            res += size;
        }
        return res;
    });
}

int32_t semcache_get_head_stats(const llama_context * ctx, semcache_head_stats * heads, int32_t n) {
    return (int32_t) counted([&] {
        expect(heads || n <= 0, "heads", "a place to write to", "NULL");
        return parts_of(ctx).store.head_stats(heads, n);
    });
}

int32_t semcache_floor(const llama_context * ctx, int32_t pos) {
    return (int32_t) counted([&] { return parts_of(ctx).floor(*ctx->get_memory(), std::max(pos, 0)); });
}

int32_t semcache_calibrate_add(llama_context * ctx) {
    return guarded([&] { parts_of(ctx).calibrate_add(); });
}

int32_t semcache_calibrate_write(llama_context * ctx, const char * path, const char * model_id) {
    return guarded([&] {
        expect(path, "path", "a file to write", "NULL");
        expect(model_id, "model_id", "a fingerprint of the model", "NULL");
        semcache::profile p = parts_of(ctx).measured;
        if (p.n_text == 0) {
            throw semcache_error(SEMCACHE_ERR_STATE,
                "calibration: expected at least one text, got none; call semcache_calibrate_add first");
        }
        p.model_id = model_id;
        std::string error;
        if (!p.write(path, error)) {
            throw semcache_error(SEMCACHE_ERR_IO, error);
        }
    });
}

int64_t semcache_work_bytes(const semcache_params * params, int32_t n_ctx, int32_t n_layer, int32_t n_head_kv,
    int32_t n_gqa, int32_t n_embd_head_k, int32_t n_embd_head_v) {
    return counted([&] {
        expect(params, "params", "parameters", "NULL");
        expect(params->n_window > 0 && params->n_sink >= 0 &&
                   params->n_stage > (int64_t) params->n_window + params->n_sink,
            "n_stage", "more than n_window + n_sink", std::to_string(params->n_stage));
        for (int32_t n : { n_ctx, n_layer, n_head_kv, n_gqa, n_embd_head_k, n_embd_head_v }) {
            expect(n > 0, "shape", "numbers above 0", std::to_string(n));
        }
        const auto & p = *params;
        auto type = [&](int32_t t) {
            const bool fills = n_embd_head_k % 32 == 0 && n_embd_head_v % 32 == 0;
            const ggml_type best = fills ? GGML_TYPE_IQ4_NL : GGML_TYPE_F16;
            return semcache::row_type_of(t == SEMCACHE_TYPE_AUTO ? best : (ggml_type) t);
        };
        semcache::pass_args a = {};
        a.shape = { n_embd_head_k, n_embd_head_v, n_gqa, 1.0f, 0.0f };
        a.n_head_kv = n_head_kv;
        a.k_type = type(p.type_k);
        a.v_type = type(p.type_v);
        const int32_t n_leave = p.n_stage - p.n_window;
        const int32_t n_voter = (n_leave + semcache::VOTE_EVERY - 1) / semcache::VOTE_EVERY + 1;
        const int32_t n_table = 2; // RoPEs that a model has, at the most that are known
        return semcache::device_plan_size(p.n_stage, n_voter) +
               n_table * semcache::device_table_size(p.n_stage, n_voter, n_embd_head_k) +
               n_layer *
                   (semcache::DEVICE_PARAMS_SIZE + semcache::device_size<float>((int64_t) n_gqa * n_embd_head_k)) +
               semcache::device_size<int32_t>(4 * (int64_t) n_layer * n_head_kv) +
               semcache::device_work_bound(a, n_ctx, p.n_stage, n_leave, n_voter);
    });
}

int32_t semcache_passes_on_device(const semcache_params * params) {
    int32_t passes = 0;
    guarded([&] { // a card that cannot be asked computes none
        for (size_t i = 0; params && i < ggml_backend_dev_count() && !passes; ++i) {
            ggml_backend_dev_t dev = ggml_backend_dev_get(i);
            const auto kind = ggml_backend_dev_type(dev);
            const bool is_card = kind == GGML_BACKEND_DEVICE_TYPE_GPU || kind == GGML_BACKEND_DEVICE_TYPE_IGPU;
            passes = is_card && semcache_device_passes(dev, *params, 0);
        }
    });
    return passes;
}

const char * semcache_version(void) { return SEMCACHE_VERSION; }

const char * semcache_upstream_commit(void) { return SEMCACHE_UPSTREAM_COMMIT; }
