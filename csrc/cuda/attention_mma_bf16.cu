#include "attention_mma_launch.cuh"

namespace dk::cuda {

int attention_mma_bf16(const AttentionArgs& args, const Split& split, cudaStream_t stream) {
  return attention_mma<Bfloat16>(args, split, stream);
}

}  // namespace dk::cuda
