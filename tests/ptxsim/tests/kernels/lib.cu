#include <cooperative_groups.h>
#include <cooperative_groups/memcpy_async.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>

#include <cub/block/block_histogram.cuh>
#include <cub/block/block_load.cuh>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/warp/warp_reduce.cuh>
namespace cg = cooperative_groups;
__global__ void k_cub(const int* x, int* o) {
  using Load = cub::BlockLoad<int, 128, 4, cub::BLOCK_LOAD_TRANSPOSE>;
  using Sort = cub::BlockRadixSort<int, 128, 4>;
  using Scan = cub::BlockScan<int, 128>;
  using Red = cub::BlockReduce<int, 128, cub::BLOCK_REDUCE_RAKING>;
  using WR = cub::WarpReduce<int>;
  __shared__ union {
    typename Load::TempStorage l;
    typename Sort::TempStorage s;
    typename Scan::TempStorage c;
    typename Red::TempStorage r;
    typename WR::TempStorage w[4];
  } tmp;
  int v[4], t = threadIdx.x;
  x += blockIdx.x * 512;
  o += blockIdx.x * 1200;
  Load(tmp.l).Load(x, v);
  __syncthreads();
  int red = Red(tmp.r).Sum(v);
  __syncthreads();
  if (t == 0) o[1024] = red;
  int sc[4];
  Scan(tmp.c).InclusiveSum(v, sc);
  __syncthreads();
  int wm = WR(tmp.w[t / 32]).Reduce(v[0], cuda::maximum<>{});
  __syncthreads();
  if (t % 32 == 0) o[1025 + t / 32] = wm;
  Sort(tmp.s).Sort(v);
  for (int i = 0; i < 4; i++) {
    o[t * 4 + i] = v[i];
    o[512 + t * 4 + i] = sc[i];
  }
}
__global__ void k_cg(const int* x, int* o) {
  auto b = cg::this_thread_block();
  auto w = cg::tiled_partition<32>(b);
  auto h = cg::tiled_partition<16>(b);
  int v = x[b.thread_rank()];
  o[threadIdx.x] = cg::reduce(w, v, cg::plus<int>());
  o[128 + threadIdx.x] = cg::reduce(h, v, cg::greater<int>());
  o[256 + threadIdx.x] = cg::inclusive_scan(w, v);
  if (v % 3 == 0) {
    auto c = cg::coalesced_threads();
    o[384 + threadIdx.x] = c.size() * 100 + c.thread_rank() + 10000 * c.shfl(v, 0);
  } else
    o[384 + threadIdx.x] = 0;
  b.sync();
}
#include <cuda_fp16.h>
#include <mma.h>
using namespace nvcuda;
