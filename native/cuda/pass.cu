// pass.cu - the pass of native/gpu as CUDA knows it: one kernel a step

#include "gpu/pass.h"

template <int STEP>
__global__ void __launch_bounds__(SC_THREADS)
    pass_step_kernel(const pass_dims m, const pass_data x, const pass_work w) {
    extern __shared__ __align__(16) uchar sh[];
    const sc_tid t = { threadIdx.x, threadIdx.x % SC_WARP, threadIdx.x / SC_WARP, blockIdx.x, blockIdx.y };
    pass_step<STEP>(t, m, x, w, sh);
}

void sc_cuda_pass(
    const pass_dims & m, const pass_data & x, const pass_work & w, int n_rows, int n_cand, cudaStream_t stream) {
    pass_steps(m, n_rows, n_cand, [&](auto step, int n_piece, int shared) {
        pass_step_kernel<decltype(step)::value><<<dim3(n_piece, m.n_head_kv), SC_THREADS, shared, stream>>>(m, x, w);
    });
}
