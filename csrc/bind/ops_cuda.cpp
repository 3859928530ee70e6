// The ops on CUDA tensors: the tensor's device, its current stream, one call of a launcher.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <atomic>

#include "attention.h"
#include "learned_step.h"
#include "noise_sum.h"
#include "ops.h"
#include "statistics.h"
#include "step_logprob.h"
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
  static void learned_step(const LearnedStepArgs& args, const Operand& where, bool) {
    launch("learned_step", cuda::learned_step, args, where);
  }
  static void noise_sum(const NoiseSumArgs& args, const Operand& where) {
    launch("noise_sum", cuda::noise_sum, args, where);
  }
  static void variational(const VariationalArgs& args, const Operand& where) {
    launch("variational", cuda::variational, args, where);
  }
  static void step_logprob(const StepLogprobArgs& args, const Operand& where) {
    launch("step_logprob", cuda::step_logprob, args, where);
  }
};

struct CudaStatistics {
  static void check(const char* op, const Operand& o) { CudaBackend::check(op, o); }
  static int64_t quantile_workspace(const Space& space) { return cuda::quantile_workspace(space); }
  static void quantile(const char* op, const QuantileArgs& args, const Operand& where) {
    launch(op, cuda::quantile, args, where);
  }
  static void moments(const MomentsArgs& args, const Operand& where) { launch("moments", cuda::moments, args, where); }
};

// 10 major + minor of a device, asked for once.
int capability(const char* op, const Operand& where) {
  static std::array<std::atomic<int>, 64> known{};
  const int32_t device = where.device_index;
  const bool kept = device < static_cast<int32_t>(known.size());
  int value = kept ? known[device].load(std::memory_order_relaxed) : 0;
  if (value != 0) return value;
  int major = 0, minor = 0;
  cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status != cudaSuccess) {
    fail(op, "the compute capability of ", device_text(where), " could not be read: ", cudaGetErrorString(status));
  }
  value = 10 * major + minor;
  if (kept) known[device].store(value, std::memory_order_relaxed);
  return value;
}

struct CudaAttention {
  static void check(const char* op, const Operand& o) { CudaBackend::check(op, o); }
  static void check_limit(const char* op, const AttentionProblem& p, const Operand& where, bool backward) {
    const int number = capability(op, where);
    const char* limit = backward ? cuda::attention_grad_limit(p, number) : cuda::attention_limit(p, number);
    if (limit != nullptr) {
      fail(op, limit, ", got ", dtype_text(where.dtype), " with ", p.dim, " channels a head on ", device_text(where),
           " of compute capability ", number / 10, ".", number % 10);
    }
  }
  static int64_t attention_workspace(const AttentionProblem& p) { return cuda::attention_workspace(p); }
  static int64_t attention_grad_workspace(const AttentionProblem& p) { return cuda::attention_grad_workspace(p); }
  static void attention(const AttentionArgs& args, const Operand& where) {
    launch("attention", cuda::attention, args, where);
  }
  static void attention_grad(const AttentionGradArgs& args, const Operand& where) {
    launch("attention_grad", cuda::attention_grad, args, where);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffkern, CUDA, m) {
  Ops<CudaBackend>::implement(m);
  LearnedStepOps<CudaBackend>::implement(m);
  NoiseSumOps<CudaBackend>::implement(m);
  VariationalOps<CudaBackend>::implement(m);
  StepLogprobOps<CudaBackend>::implement(m);
  StatisticsOps<CudaStatistics>::implement(m);
  AttentionOps<CudaAttention>::implement(m);
}

}  // namespace dk::bind
