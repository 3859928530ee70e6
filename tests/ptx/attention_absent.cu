// Weak launchers for the families of kernels that a test leaves out, as compiling a family takes seconds: an entry that
// needs one of them refuses.
#include <core/attention.h>
#include <cuda/attention_grad_launch.cuh>

#define WEAK __attribute__((weak))

namespace dk::cuda {
WEAK int attention_mma_bf16(const AttentionArgs&, const Split&, cudaStream_t) { return cudaErrorNotSupported; }
WEAK int attention_grad_mma_bf16(const AttentionGradArgs&, const QueryTerms&, cudaStream_t) {
  return cudaErrorNotSupported;
}
}  // namespace dk::cuda
