// run-attn.h - the host's side of attention on a device, the same for all of them
//
// A device D has besides, see run-pass.h:
//
//     n_block(many)           blocks that it runs at once, about; many: of attn_many_part
//     attn_work(n)            n floats of its memory until the operation is over
//     attn_part<D, NQ>(n_part, n_group, a, x, work)
//     attn_reduce<D>(n, a, x, work, dst)      launch kernels of prop-attn.h
//     attn_many_part<D>(n_part, n_group, a, x, work)   of prop-attn-many.h, where it has_mma()

#pragma once

#include "attn-dims.h"
#include "ggml-prop-attn-args.h"
#include "pass/task.h"
#include "prop-attn-many.h"

#include <type_traits>

namespace semcache {

// Calls f(head size, query rows of a block) with both as constants: as many rows as n_query fill, within what a block
// may share. False if there are no kernels for heads of d values.
template <int D, int NQ, typename F> void device_queries(int n_query, F && f) {
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
        case 64: device_queries<64, 8>(n_query, f); return true;
        case 128: device_queries<128, 8>(n_query, f); return true;
#if !defined(SC_COMMON_HEADS) // quick to compile, for tests
        case 80: device_queries<80, 8>(n_query, f); return true;
        case 96: device_queries<96, 8>(n_query, f); return true;
        case 112: device_queries<112, 8>(n_query, f); return true;
        case 192: device_queries<192, 4>(n_query, f); return true;
        case 256: device_queries<256, 4>(n_query, f); return true;
#endif
        default: return false;
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

template <typename D> void device_attend(D & dev, const ggml_tensor * dst) {
    const attn_args host = attn_args_of(dst);
    const prop_attn_src x = { host.q, host.k, host.v, (const uchar *) host.mask, host.k_core, host.v_core,
        (const sc_half *) host.bias, (const sc_half *) host.heads, host.row_first, host.sinks };
    const int n_query = host.n_head / host.n_head_kv * host.n_tokens;
    const bool many = n_query > MANY_LEAST && dev.has_mma();
    device_head(host.n_embd_head_k, n_query, [&](auto d, auto nq) {
        const int n_row = many ? SC_MANY_ROWS : (int) nq, n_group = (n_query + n_row - 1) / n_row;
        const int64_t part_size = (int64_t) host.n_tokens * host.n_head * (d + 2); // in floats
        const int n_most = (int) std::max<int64_t>(1, ATTN_WORK / part_size / (int64_t) sizeof(float));
        const prop_attn_args a = device_attn_args(host, std::min(n_most, device_parts(dev.n_block(many), n_group)));
        float * work = dev.attn_work((size_t) (a.n_part * part_size));
        if (many) {
            dev.template attn_many_part<d>(a.n_part, n_group, a, x, work);
        } else {
            dev.template attn_part<d, nq>(a.n_part, n_group, a, x, work);
        }
        dev.template attn_reduce<d>(a.n_head * a.n_tokens, a, x, work, (float *) dst->data);
    });
}

} // namespace semcache
