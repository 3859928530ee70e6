// Backward attention in bfloat16.
#include "attention_grad_mma_launch.cuh"

namespace dk::cuda {

int attention_grad_mma_bf16(const AttentionGradArgs& args, const QueryTerms& terms, cudaStream_t stream) {
  return grad::launch<Bfloat16>(args, terms, stream);
}

}  // namespace dk::cuda
