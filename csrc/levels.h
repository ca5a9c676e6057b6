// The instruction-set levels that were compiled in, and which of them this machine runs. The only place that asks the
// CPU.
#pragma once

#include "ops.h"

namespace llmcore {

constexpr int64_t BEST_LEVEL = -1;

int64_t level_count();
const char* level_name(int64_t level);
// An empty string when this machine runs the level, else the instructions it lacks.
const char* level_lacks(int64_t level);
int64_t best_level();
// The kernels of a level, or of the best one for BEST_LEVEL; null when this machine cannot run it or there is none
// such.
const Kernels* kernels_at(int64_t level);

}  // namespace llmcore
