// What csrc/bind asks csrc/cpu beside the ops.
#pragma once

#include "args.h"

namespace dk::cpu {

// The work of an op is split into blocks of one sample each.
int64_t blocks_per_sample(const Space& space);

// Instruction sets, by the names that DIFFKERN_ISA takes.
const char* isa_name();            // the level in use
const char* isa_best();            // the best this machine has
const char* isa_level(int level);  // all that this build has code for, the least first; null past the last

}  // namespace dk::cpu
