// Standard normals by address.
#include "../core/randn.h"

#include <cstring>

#include "blocks.h"

namespace dk::cpu {

void normals(uint64_t seed, uint64_t stream, uint64_t quad, int64_t quads, float* out) {
  float group[4 * kQuadsAtOnce];
  for (int64_t done = 0; done < quads; done += kQuadsAtOnce) {
    const int64_t n = quads - done < kQuadsAtOnce ? quads - done : kQuadsAtOnce;
    isa().normals(seed, stream, quad + static_cast<uint64_t>(done), n, group);
    std::memcpy(out + 4 * done, group, static_cast<size_t>(4 * n) * sizeof(float));
  }
}

void randn(const RandnArgs& args, int64_t begin, int64_t end) {
  const int64_t room = 4 * kQuadsAtOnce;
  for (int64_t i = begin; i < end; ++i) {
    const Block block = block_at(args.space, i);
    const uint64_t seed = seed_of(args.seeds, block.sample);
    const bool direct = args.space.layout == Layout::contiguous && args.out.dtype == Dtype::f32;
    if (direct && block.n % room == 0) {  // straight into the tensor
      float* out = reinterpret_cast<float*>(address(args.out, block.sample * args.out.batch_stride + block.begin));
      isa().normals(seed, args.stream, static_cast<uint64_t>(block.begin / 4), block.n / 4, out);
      continue;
    }
    float buffer[kNoiseRoom];
    scatter(args.space, args.out, block, draw(args.space, block, seed, args.stream, buffer));
  }
}

}  // namespace dk::cpu
