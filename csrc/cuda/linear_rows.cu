// A linear layer row by row: half a warp has one output of some rows, and reads its weights once. With SiLU, x is
// activated beforehand, once for all outputs.
#include "../core/linear_rows.h"
#include "memory.cuh"

namespace dk::cuda {
namespace {

constexpr unsigned kLinearThreads = 128;
constexpr int kOutputs = static_cast<int>(kLinearThreads) / kLinearLanes;  // of a block
constexpr int kRowsAtOnce = 4;
static_assert(kLinearLanes == 16, "two outputs a warp");

template <class S>
__global__ void __launch_bounds__(kLinearThreads) prepare_kernel(const LinearRowsArgs args) {
  using T = Arithmetic<S>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= args.rows * args.inputs) return;
  const int64_t at = i / args.inputs * args.x.stride + i % args.inputs;
  static_cast<T*>(args.prepared)[i] = silu(T(decode(static_cast<const S*>(args.x.data)[at])));
}

// X: the stored type of what is read in place of x.
template <class S, class X>
__global__ void __launch_bounds__(kLinearThreads) multiply_kernel(const LinearRowsArgs args) {
  using T = Arithmetic<S>;
  const int64_t blocks = (args.outputs + kOutputs - 1) / kOutputs;
  const int lane = static_cast<int>(threadIdx.x) % kLinearLanes, mine = static_cast<int>(threadIdx.x) / kLinearLanes;
  const int64_t c = static_cast<int64_t>(blockIdx.x) % blocks * kOutputs + mine;
  const int64_t row = static_cast<int64_t>(blockIdx.x) / blocks * kRowsAtOnce, last = args.rows - 1 - row;
  const bool valid = c < args.outputs;  // the others take part in the exchange of their warp
  const bool ready = args.prepared != nullptr;
  const int64_t stride = ready ? args.inputs : args.x.stride;
  const S* w = static_cast<const S*>(args.weight.data) + (valid ? c : 0) * args.weight.stride;
  const X* x[kRowsAtOnce];
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
    x[r] = static_cast<const X*>(ready ? args.prepared : args.x.data) + (row + (r < last ? r : last)) * stride;
  }
  T sum[kRowsAtOnce] = {};
#pragma unroll 4
  for (int64_t k = lane; k < args.inputs; k += kLinearLanes) {
    const T weight = decode(w[k]);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) sum[r] = fma(T(decode(x[r][k])), weight, sum[r]);
  }
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
    for (int half = kLinearLanes / 2; half > 0; half /= 2) {  // linear_fold: lane 0 of 16 has what it is there
      sum[r] = add(sum[r], __shfl_down_sync(0xffffffffu, sum[r], static_cast<unsigned>(half)));
    }
  }
  if (lane != 0 || !valid) return;
  const bool biased = args.bias != nullptr;
  const T bias = biased ? T(decode(static_cast<const S*>(args.bias)[c * args.bias_stride])) : T(0);
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
    if (r > last) return;
    S value;
    encode(biased ? add(sum[r], bias) : sum[r], value);
    static_cast<S*>(args.out.data)[(row + r) * args.out.stride + c] = value;
  }
}

int launch_blocks(void (*kernel)(LinearRowsArgs), int64_t blocks, void* stream, const LinearRowsArgs& args) {
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(kernel, Shape{dim3(static_cast<unsigned>(blocks)), kLinearThreads}, stream, args);
}

template <class S>
int run(const LinearRowsArgs& args, void* stream) {
  if (args.prepared != nullptr && args.inputs > 0) {
    const int64_t blocks = (args.rows * args.inputs + kLinearThreads - 1) / kLinearThreads;
    const int status = launch_blocks(prepare_kernel<S>, blocks, stream, args);
    if (status != cudaSuccess) return status;
  }
  const int64_t blocks = (args.outputs + kOutputs - 1) / kOutputs * ((args.rows + kRowsAtOnce - 1) / kRowsAtOnce);
  const auto kernel = args.prepared != nullptr ? multiply_kernel<S, Arithmetic<S>> : multiply_kernel<S, S>;
  return launch_blocks(kernel, blocks, stream, args);
}

}  // namespace

bool linear_rows_prepares(const LinearRowsArgs& args) { return args.silu; }

int linear_rows(const LinearRowsArgs& args, void* stream) {
  return for_dtype(args.dtype, [&](auto s) { return run<decltype(s)>(args, stream); });
}

}  // namespace dk::cuda
