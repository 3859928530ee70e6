// Attention for few queries or keys: tiles would be half empty, and packing them would be most of the work.
#pragma once

#include "../core/attention.h"

namespace dk::cpu {

// By the numbers of queries and keys alone, so that neither layout nor batch changes a bit.
bool attention_by_rows(const AttentionProblem& p);

// Tasks as in attention.cpp: kQueryTile queries of one head.
void attention_rows(const AttentionArgs& args, int64_t begin, int64_t end);

}  // namespace dk::cpu
