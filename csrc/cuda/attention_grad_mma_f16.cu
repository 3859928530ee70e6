// Backward attention in float16.
#include "attention_grad_mma_launch.cuh"

namespace dk::cuda {

int attention_grad_mma_f16(const AttentionGradArgs& args, const QueryTerms& terms, cudaStream_t stream) {
  return grad::launch<Half>(args, terms, stream);
}

}  // namespace dk::cuda
