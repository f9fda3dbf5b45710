// prop-attn.cu - the kernels of native/gpu as CUDA knows them

#include "gpu/prop-attn.h"

template <int D, int NQ>
__global__ void __launch_bounds__(SC_THREADS)
    prop_attn_part_kernel(const prop_attn_args a, const prop_attn_src src, float * work) {
    extern __shared__ __align__(16) uchar sh[];
    const sc_tid t = { threadIdx.x, threadIdx.x % SC_WARP, threadIdx.x / SC_WARP, blockIdx.x, blockIdx.y };
    prop_attn_part<D, NQ>(t, a, src, work, sh);
}

template <int D>
__global__ void __launch_bounds__(SC_THREADS)
    prop_attn_reduce_kernel(const prop_attn_args a, const prop_attn_src src, const float * work, float * dst) {
    const sc_tid t = { threadIdx.x, threadIdx.x % SC_WARP, threadIdx.x / SC_WARP, blockIdx.x, blockIdx.y };
    prop_attn_reduce<D>(t, a, src.rows, src.sinks, work, dst);
}

// Head sizes of the models that llama.cpp knows, with as many query rows a block as fit 32 KiB; one for models without
// groups.
#define SC_INSTANCE(D, NQ) \
    template __global__ void prop_attn_part_kernel<D, NQ>(prop_attn_args, prop_attn_src, float *);
#define SC_INSTANCES(D, NQ) \
    SC_INSTANCE(D, NQ) SC_INSTANCE(D, 1) \
    template __global__ void prop_attn_reduce_kernel<D>(prop_attn_args, prop_attn_src, const float *, float *);
SC_INSTANCES(64, 8)
SC_INSTANCES(96, 8)
SC_INSTANCES(128, 8)
#if !defined(SC_COMMON_HEADS)
SC_INSTANCES(80, 8)
SC_INSTANCES(112, 8)
SC_INSTANCES(192, 4)
SC_INSTANCES(256, 4)
#endif
