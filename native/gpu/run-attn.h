// run-attn.h - the host's side of attention on a device, the same for all of them
//
// A device D has besides, see run-pass.h:
//
//     n_block(many)           blocks that it runs at once, about; many: of attn_many_part
//     attn_work(n)            n floats of its memory until the operation is over
//     attn_part<D, NQ>(n_part, n_group, a, x, work)
//     attn_reduce<D>(n, a, x, work, dst)      launch kernels of prop-attn.h
//     KNOWS_MMA               constant: whether it has the next two
//     has_mma()
//     attn_many_part<D>(n_part, n_group, a, x, work)   of prop-attn-many.h, where it has_mma()

#pragma once

#include "attn-dims.h"
#include "ggml-prop-attn-args.h"
#include "pass/task.h"

#include <type_traits>

namespace semcache {

// Query rows of a block for heads of D values: as many as fill what it may share.
constexpr int most_query_rows(int d) { return d <= 128 ? 8 : 4; }

// Calls f(head size, query rows of a block) with both as constants: as many rows as n_query fill. False if there are no
// kernels for heads of d values.
template <int D, typename F> void device_queries(int n_query, F && f) {
    constexpr int NQ = most_query_rows(D);
    if (n_query > NQ / 2) {
        f(std::integral_constant<int, D>(), std::integral_constant<int, NQ>());
    } else if (n_query > 1) {
        f(std::integral_constant<int, D>(), std::integral_constant<int, NQ / 2>());
    } else {
        f(std::integral_constant<int, D>(), std::integral_constant<int, 1>());
    }
}
template <typename F> bool device_head(int64_t d, int n_query, F && f) {
    switch (d) {
        case 64: device_queries<64>(n_query, f); return true;
        case 128: device_queries<128>(n_query, f); return true;
#if !defined(SC_COMMON_HEADS) // quick to compile, for tests
        case 80: device_queries<80>(n_query, f); return true;
        case 96: device_queries<96>(n_query, f); return true;
        case 112: device_queries<112>(n_query, f); return true;
        case 192: device_queries<192>(n_query, f); return true;
        case 256: device_queries<256>(n_query, f); return true;
#endif
        default: return false;
    }
}

// Calls f(query rows of a block) for all kernels of heads of d values.
template <typename F> void device_query_rows(int64_t d, F && f) {
    for (int n_query : { 1, 2, 8 }) {
        device_head(d, n_query, [&](auto, auto nq) { f((int) nq); });
    }
}

// Whether the kernels compute this node: attention of a cache that is not transposed, and passes by our own method.
inline bool device_supports(const ggml_tensor * op) {
    switch (ggml_prop_attn_get_kind(op)) {
        case GGML_PROP_ATTN_ATTEND: return device_head(device_head_size(op), 1, [](auto, auto) {});
        case GGML_PROP_ATTN_PASS: {
            const pass_task * task = (const pass_task *) ggml_prop_attn_get_task(op);
            return task->plan->how == method::semantic;
        }
        default: return false;
    }
}

// Query rows of a kv head's group beyond which matrix units are used: fewer would leave most of a block without work.
// Not tuned: no card was at hand.
constexpr int MANY_LEAST = 32;

// Bytes that the sums of all parts take at the most, unless one part takes more: they come from memory that nobody has
// set aside. Not tuned either.
constexpr int64_t ATTN_WORK = 64 << 20;

// Query rows of a kv head's group.
inline int n_query_row(const attn_args & a) { return a.n_head / a.n_head_kv * a.n_tokens; }

// Blocks that attention is cut into, and the floats that they work in; n_row: query rows of each, n_block: what a
// device runs at once.
struct attn_grid {
    int n_part, n_group;
    int64_t n_work;
};
inline attn_grid device_grid(const attn_args & a, int n_row, int n_block) {
    const int n_group = (n_query_row(a) + n_row - 1) / n_row;
    const int64_t part_size = (int64_t) a.n_tokens * a.n_head * (a.n_embd_head_v + 2);
    const int n_most = (int) std::max<int64_t>(1, ATTN_WORK / part_size / (int64_t) sizeof(float));
    const int n_part = std::min(n_most, device_parts(n_block, n_group));
    return { n_part, n_group, n_part * part_size };
}

template <typename D> void device_attend(D & dev, const ggml_tensor * dst) {
    const attn_args host = attn_args_of(dst);
    const prop_attn_src x = { host.q, host.k, host.v, (const uchar *) host.mask, host.k_core, host.v_core,
        (const sc_half *) host.bias, (const sc_half *) host.heads, host.row_first, host.sinks };
    bool many = false;
    if constexpr (D::KNOWS_MMA) {
        many = n_query_row(host) > MANY_LEAST && dev.has_mma();
    }
    device_head(host.n_embd_head_k, n_query_row(host), [&](auto d, auto nq) {
        const attn_grid grid = device_grid(host, many ? SC_MANY_ROWS : (int) nq, dev.n_block(many));
        const prop_attn_args a = device_attn_args(host, grid.n_part);
        float * work = dev.attn_work((size_t) grid.n_work);
        if (!many) {
            dev.template attn_part<d, nq>(grid.n_part, grid.n_group, a, x, work);
        } else if constexpr (D::KNOWS_MMA) {
            dev.template attn_many_part<d>(grid.n_part, grid.n_group, a, x, work);
        }
        dev.template attn_reduce<d>(a.n_head * a.n_tokens, a, x, work, (float *) dst->data);
    });
}

} // namespace semcache
