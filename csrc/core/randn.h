// Standard normals by address: element i of a sample is a function of (seed, stream, i), see philox.h and normal.h.
#pragma once

#include "args.h"

namespace dk {

struct RandnArgs {
  Space space;
  View out;
  Seeds seeds;
  uint64_t stream;
};

namespace cpu {
void randn(const RandnArgs& args, int64_t begin, int64_t end);
void normals(uint64_t seed, uint64_t stream, uint64_t quad, int64_t quads, float* out);  // any counter, for tests
}  // namespace cpu
namespace cuda {
int randn(const RandnArgs& args, void* stream);
}

}  // namespace dk
