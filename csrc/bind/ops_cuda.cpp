// The ops on CUDA tensors: the tensor's device, its current stream, one launch.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "variational.h"

namespace dk::bind {
namespace {

template <class Args>
void launch(const char* op, int (*launcher)(const Args&, void*), const Args& args, const Operand& where) {
  const torch::stable::accelerator::DeviceGuard guard(where.device_index);
  void* stream = nullptr;
  check_status(aoti_torch_get_current_cuda_stream(where.device_index, &stream));
  const auto status = static_cast<cudaError_t>(launcher(args, stream));
  if (status != cudaSuccess) {
    fail(op, "the kernel could not be launched on ", device_text(where), ": ", cudaGetErrorString(status),
         " (python -m diffkern info says which architectures and driver this build serves)");
  }
}

struct CudaBackend {
  static constexpr bool kHost = false;
  static constexpr int64_t kMaxChannels = INT64_MAX;

  static void check(const char* op, const Operand& o) {
    if (o.device_type != aoti_torch_device_type_cuda()) {
      fail(op, o.name, " must be on a CUDA device, got ", device_text(o));
    }
  }
  static void randn(const RandnArgs& args, const Operand& where) { launch("randn", cuda::randn, args, where); }
  static void noising(const NoisingArgs& args, const Operand& where) { launch("noising", cuda::noising, args, where); }
  static void step(const StepArgs& args, const Operand& where, bool) { launch("step", cuda::step, args, where); }
  static void loss(const LossArgs& args, const Operand& where) { launch("loss", cuda::loss, args, where); }
  static void variational(const VariationalArgs& args, const Operand& where) {
    launch("variational", cuda::variational, args, where);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffkern, CUDA, m) {
  Ops<CudaBackend>::implement(m);
  VariationalOps<CudaBackend>::implement(m);
}

}  // namespace dk::bind
