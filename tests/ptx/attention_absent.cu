// Weak launchers for the families of kernels that a test leaves out, as reading the PTX of a family takes seconds: an
// entry that needs one of them refuses.
#include <core/attention.h>
#include <cuda/attention_launch.cuh>

#define WEAK __attribute__((weak))

namespace dk::cuda {
WEAK const char* attention_grad_limit(const AttentionProblem&, int) { return "absent"; }
WEAK int64_t attention_grad_workspace(const AttentionProblem&) { return 0; }
WEAK int attention_grad(const AttentionGradArgs&, void*) { return cudaErrorNotSupported; }
WEAK int attention_ffma(const AttentionArgs&, const Split&, cudaStream_t) { return cudaErrorNotSupported; }
}  // namespace dk::cuda
