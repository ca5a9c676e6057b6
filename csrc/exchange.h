// How far apart two CPUs are: what they share (a second cache, a third, a socket, nothing) and how busy it is.
#pragma once

#include <cstdint>

namespace llmcore {

// Seconds that a cache line takes from one CPU to another, by their numbers; negative where that cannot be measured.
// Takes some milliseconds.
double exchange_seconds(int64_t one, int64_t other);

}  // namespace llmcore
