// The order in which the values of a sample, and the samples of a batch, are added up: one, whatever the threads, the
// grid or the batch.
//
// Blocks of kSumBlock consecutive elements are folded (element i + element i + half, half = kSumBlock / 2, ..., 1;
// missing elements are 0), and the blocks' sums of a sample are added by kSumLanes lanes (lane j takes blocks j,
// j + kSumLanes, ... in turn) and folded again. Samples of a batch likewise, by the lanes.
#pragma once

#include "arith.h"

namespace dk {

constexpr int kSumBlock = 1024;
constexpr int kSumLanes = 256;

DK_HD int64_t sum_blocks(int64_t count) { return (count + kSumBlock - 1) / kSumBlock; }

// What becomes of the samples' values.
enum class Reduction : int32_t { none, mean, sum };

}  // namespace dk
