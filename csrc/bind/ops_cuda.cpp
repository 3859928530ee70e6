// The ops on CUDA tensors: the tensor's device, its current stream, one call of a launcher.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <atomic>

#include "families.h"

namespace dk::bind {
namespace {

struct CudaBackend {
  static constexpr bool kHost = false;
  static constexpr int64_t kMaxChannels = INT64_MAX;

  static void check(const char* op, const Operand& o) {
    if (o.device_type != aoti_torch_device_type_cuda()) {
      fail(op, o.name, " must be on a CUDA device, got ", device_text(o));
    }
  }

  template <class Args>
  static void launch(const char* op, int (*launcher)(const Args&, void*), const Args& args, const Operand& where) {
    const torch::stable::accelerator::DeviceGuard guard(where.device_index);
    void* stream = nullptr;
    check_status(aoti_torch_get_current_cuda_stream(where.device_index, &stream));
    const auto status = static_cast<cudaError_t>(launcher(args, stream));
    if (status != cudaSuccess) {
      fail(op, "the kernel could not be launched on ", device_text(where), ": ", cudaGetErrorString(status),
           " (python -m diffkern info says which architectures and driver this build serves)");
    }
  }

  // 10 major + minor of a device, asked for once.
  static int capability(const char* op, const Operand& where) {
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
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffkern, CUDA, m) {
  for_each_family<CudaBackend>([&](auto family) { family.implement(m); });
}

}  // namespace dk::bind
