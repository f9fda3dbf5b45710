#include "ggml-prop-attn-cuda.cuh"

#include "ggml-prop-attn.h"
#include "gpu/pass.h"
#include "gpu/run-pass.h"

namespace {

template <int STEP>
__global__ void __launch_bounds__(SC_THREADS) step_kernel(const pass_dims m, const pass_data x, const pass_work w) {
    extern __shared__ __align__(16) uchar sh[];
    const sc_tid t = { threadIdx.x, threadIdx.x % SC_WARP, threadIdx.x / SC_WARP, blockIdx.x, blockIdx.y };
    pass_step<STEP>(t, m, x, w, sh);
}

// A device as gpu/run-pass.h wants it.
class cuda_device {
public:
    explicit cuda_device(cudaStream_t stream) : stream(stream) {}

    template <int STEP>
    void pass_step(int n_piece, int n_head, int shared, const pass_dims & m, const semcache::pass_layout::layer &,
        const pass_data & x, const pass_work & w) {
        step_kernel<STEP><<<dim3(n_piece, n_head), SC_THREADS, shared, stream>>>(m, x, w);
        CUDA_CHECK(cudaGetLastError());
    }

private:
    cudaStream_t stream;
};

} // namespace

void ggml_cuda_prop_attn_pass(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    cuda_device dev(ctx.stream());
    const auto & task = *(const semcache::pass_task *) ggml_prop_attn_get_task(dst);
    semcache::device_pass<cuda_device>(dev, task).run();
}
