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
    device const float * sinks [[buffer(10)]],
    device float * work [[buffer(11)]],
    threadgroup uchar * sh [[threadgroup(0)]],
    uint id [[thread_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort warp [[simdgroup_index_in_threadgroup]],
    uint3 tg [[threadgroup_position_in_grid]]) {
    const sc_tid t = { id, lane, warp, tg.x, tg.y };
    const prop_attn_src src = { q, k, v, mask, core_k, core_v, bias, heads, rows, sinks };
    prop_attn_part<D, NQ>(t, a, src, work, sh);
}

template <int D>
kernel void kernel_prop_attn_reduce(
    constant prop_attn_args & a [[buffer(0)]],
    device const int * rows [[buffer(9)]],
    device const float * sinks [[buffer(10)]],
    device const float * work [[buffer(11)]],
    device float * dst [[buffer(12)]],
    uint id [[thread_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort warp [[simdgroup_index_in_threadgroup]],
    uint3 tg [[threadgroup_position_in_grid]]) {
    const sc_tid t = { id, lane, warp, tg.x, tg.y };
    prop_attn_reduce<D>(t, a, rows, sinks, work, dst);
}

// As in cuda/prop-attn.cu.
#define SC_PART(D, NQ)                                            \
    template [[host_name("kernel_prop_attn_part_d" #D "_q" #NQ)]] \
    kernel decltype(kernel_prop_attn_part<D, NQ>) kernel_prop_attn_part<D, NQ>;
#define SC_INSTANCES(D, NQ)                             \
    SC_PART(D, NQ)                                      \
    SC_PART(D, 1)                                       \
    template [[host_name("kernel_prop_attn_reduce_d" #D)]] \
    kernel decltype(kernel_prop_attn_reduce<D>) kernel_prop_attn_reduce<D>;

SC_INSTANCES(64, 8)
SC_INSTANCES(80, 8)
SC_INSTANCES(96, 8)
SC_INSTANCES(112, 8)
SC_INSTANCES(128, 8)
SC_INSTANCES(192, 4)
SC_INSTANCES(256, 4)
