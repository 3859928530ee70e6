#include "attention_mma_launch.cuh"

namespace dk::cuda {

int attention_mma_f16(const AttentionArgs& args, const Split& split, cudaStream_t stream) {
  return attention_mma<Half>(args, split, stream);
}

}  // namespace dk::cuda
