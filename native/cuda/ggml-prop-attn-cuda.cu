#include "ggml-prop-attn-cuda.cuh"

#include "gpu/prop-attn-many.h"
#include "gpu/run-attn.h"

namespace {

template <int D, int NQ>
__global__ void __launch_bounds__(SC_THREADS) part_kernel(const prop_attn_args a, const prop_attn_src x, float * work) {
    extern __shared__ __align__(16) uchar sh[];
    const sc_tid t = { threadIdx.x, threadIdx.x % SC_WARP, threadIdx.x / SC_WARP, blockIdx.x, blockIdx.y };
    prop_attn_part<D, NQ>(t, a, x, work, sh);
}

template <int D>
__global__ void __launch_bounds__(SC_THREADS) many_kernel(const prop_attn_args a, const prop_attn_src x, float * work) {
    extern __shared__ __align__(16) uchar sh[];
    const sc_tid t = { threadIdx.x, threadIdx.x % SC_WARP, threadIdx.x / SC_WARP, blockIdx.x, blockIdx.y };
    prop_attn_many_part<D>(t, a, x, work, sh);
}

template <int D>
__global__ void __launch_bounds__(SC_THREADS)
    reduce_kernel(const prop_attn_args a, const prop_attn_src x, const float * work, float * dst) {
    const sc_tid t = { threadIdx.x, threadIdx.x % SC_WARP, threadIdx.x / SC_WARP, blockIdx.x, blockIdx.y };
    prop_attn_reduce<D>(t, a, x.rows, x.sinks, work, dst);
}

// A device as gpu/run-attn.h wants it.
class cuda_device {
public:
    explicit cuda_device(ggml_backend_cuda_context & ctx) : ctx(ctx), memory(ctx.pool()) {}

    // Four blocks fit the registers of a multiprocessor, two those of many queries.
    int n_block(bool many) const { return (many ? 2 : 4) * ggml_cuda_info().devices[ctx.device].nsm; }

    static constexpr bool KNOWS_MMA = true;
    bool has_mma() const { return turing_mma_available(ggml_cuda_info().devices[ctx.device].cc); }

    float * attn_work(size_t n) { return memory.alloc(n); }

    template <int D, int NQ>
    void attn_part(int n_part, int n_group, const prop_attn_args & a, const prop_attn_src & x, float * work) {
        constexpr int shared = prop_attn_shared<D, NQ>::SIZE;
        part_kernel<D, NQ><<<dim3(n_part, n_group), SC_THREADS, shared, ctx.stream()>>>(a, x, work);
        CUDA_CHECK(cudaGetLastError());
    }

    template <int D>
    void attn_many_part(int n_part, int n_group, const prop_attn_args & a, const prop_attn_src & x, float * work) {
        constexpr int shared = prop_attn_many_shared<D>::SIZE; // more than a kernel has without asking, for large heads
        CUDA_CHECK(cudaFuncSetAttribute(many_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
        many_kernel<D><<<dim3(n_part, n_group), SC_THREADS, shared, ctx.stream()>>>(a, x, work);
        CUDA_CHECK(cudaGetLastError());
    }

    template <int D>
    void attn_reduce(int n, const prop_attn_args & a, const prop_attn_src & x, const float * work, float * dst) {
        reduce_kernel<D><<<n, SC_THREADS, 0, ctx.stream()>>>(a, x, work, dst);
        CUDA_CHECK(cudaGetLastError());
    }

private:
    ggml_backend_cuda_context & ctx;
    ggml_cuda_pool_alloc<float> memory; // goes back to the pool, which the stream's next operations take from
};

} // namespace

bool ggml_cuda_prop_attn_supported(const ggml_tensor * op) { return semcache::device_supports(op); }

void ggml_cuda_prop_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (ggml_prop_attn_get_kind(dst) == GGML_PROP_ATTN_PASS) {
        ggml_cuda_prop_attn_pass(ctx, dst);
        return;
    }
    cuda_device dev(ctx);
    semcache::device_attend(dev, dst);
}
