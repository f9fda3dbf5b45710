// prop-attn.metal - the kernels of native/gpu/prop-attn.h as Metal knows them

#include "gpu/prop-attn.h"

template <int D, int NQ>
kernel void kernel_prop_attn_part(
    constant prop_attn_args & a [[buffer(0)]],
    device const float * q [[buffer(1)]],
    device const uchar * k [[buffer(2)]],
    device const uchar * v [[buffer(3)]],
    device const uchar * mask [[buffer(4)]],
    device const uchar * core_k [[buffer(5)]],
    device const uchar * core_v [[buffer(6)]],
    device const half * bias [[buffer(7)]],
    device const half * heads [[buffer(8)]],
    device const int * rows [[buffer(9)]],
    device float * work [[buffer(10)]],
    SC_SHARED uchar * sh [[threadgroup(0)]],
    uint id [[thread_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort warp [[simdgroup_index_in_threadgroup]],
    uint3 tg [[threadgroup_position_in_grid]]) {
    const sc_tid t = { id, lane, warp, tg.x, tg.y };
    const prop_attn_src src = { q, k, v, mask, core_k, core_v, bias, heads, rows, nullptr };
    prop_attn_part<D, NQ>(t, a, src, work, sh);
}

template <int D>
kernel void kernel_prop_attn_reduce(
    constant prop_attn_args & a [[buffer(0)]],
    device const int * rows [[buffer(1)]],
    device const float * sinks [[buffer(2)]],
    device const float * work [[buffer(3)]],
    device float * dst [[buffer(4)]],
    uint id [[thread_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort warp [[simdgroup_index_in_threadgroup]],
    uint3 tg [[threadgroup_position_in_grid]]) {
    const sc_tid t = { id, lane, warp, tg.x, tg.y };
    prop_attn_reduce<D>(t, a, rows, sinks, work, dst);
}

// As device_query_rows() of gpu/run-attn.h asks for them.
#define SC_INSTANCES(D, NQ, HALF)                                                   \
    SC_KERNEL(kernel_prop_attn_part_d##D##_q##NQ, kernel_prop_attn_part<D, NQ>)     \
    SC_KERNEL(kernel_prop_attn_part_d##D##_q##HALF, kernel_prop_attn_part<D, HALF>) \
    SC_KERNEL(kernel_prop_attn_part_d##D##_q1, kernel_prop_attn_part<D, 1>)         \
    SC_KERNEL(kernel_prop_attn_reduce_d##D, kernel_prop_attn_reduce<D>)

SC_INSTANCES(64, 8, 4)
SC_INSTANCES(80, 8, 4)
SC_INSTANCES(96, 8, 4)
SC_INSTANCES(112, 8, 4)
SC_INSTANCES(128, 8, 4)
SC_INSTANCES(192, 4, 2)
SC_INSTANCES(256, 4, 2)
