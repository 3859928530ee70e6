// The real launchers behind C functions, and a probe of the Philox words as the device computes them.
#include <core/philox.h>

#include "flat.h"

#define DEFINE(NAME) \
  extern "C" int dk_##NAME(FLAT_PARAMETERS) { return dk::cuda::NAME(flat::NAME(FLAT_ARGUMENTS), nullptr); }
FLAT_OPS(DEFINE)

__global__ void philox_probe(const uint64_t* in, uint32_t* out, int n) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= n) return;
  const dk::Words w = dk::philox(in[3 * i], in[3 * i + 1], in[3 * i + 2]);
  for (int j = 0; j < 4; ++j) out[4 * i + j] = w.r[j];
}

extern "C" int dk_philox(const uint64_t* in, uint32_t* out, int n) {
  philox_probe<<<1, 32>>>(in, out, n);
  return static_cast<int>(cudaGetLastError());
}

extern "C" int64_t dk_quantile_workspace(int64_t batch, int64_t count) {
  dk::Space space{};
  space.batch = batch;
  space.count = count;
  return dk::cuda::quantile_workspace(space);
}
