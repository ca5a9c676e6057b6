#include "levels.h"

#include <cstdlib>
#include <string>
#include <vector>

namespace llmcore {

Runtime runtime = {
    [](int64_t count, int64_t, Runtime::Body body, void* context) { body(0, count, context); },
    [] { return int64_t{1}; },
    [](int64_t bytes) { return Memory{std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64), bytes}; },
    [](Memory memory) { std::free(memory.data); },
    int64_t{32} << 20,
};

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
  std::string lacks;
};

#if defined(__x86_64__)
// __builtin_cpu_supports wants a literal. It also asks the operating system whether it saves the registers.
#define LACKS(feature) (__builtin_cpu_supports(feature) ? "" : " " feature)
std::string lacking(const std::string& level) {
  std::string lacks;
  if (level == "portable") return lacks;
  lacks = lacks + LACKS("avx2") + LACKS("fma") + LACKS("f16c");
  if (level == "avx2") return lacks;
  lacks = lacks + LACKS("avx512f") + LACKS("avx512bw") + LACKS("avx512dq") + LACKS("avx512vl");
  if (level == "avx512") return lacks;
  return lacks + LACKS("avx512bf16") + LACKS("avx512vnni");
}
#undef LACKS
#else
std::string lacking(const std::string&) { return ""; }
#endif

const std::vector<Level>& levels() {
#define LLMCORE_LEVEL_ROW(level) {#level, &level::kernels, lacking(#level)},
  static const std::vector<Level> all = {LLMCORE_LEVELS(LLMCORE_LEVEL_ROW)};
#undef LLMCORE_LEVEL_ROW
  return all;
}

}  // namespace

int64_t level_count() { return int64_t(levels().size()); }
const char* level_name(int64_t level) { return levels()[size_t(level)].name; }
const char* level_lacks(int64_t level) { return levels()[size_t(level)].lacks.c_str(); }

int64_t best_level() {
  static const int64_t best = [] {
    int64_t level = level_count() - 1;
    while (level > 0 && !levels()[size_t(level)].lacks.empty()) --level;
    return level;
  }();
  return best;
}

const Kernels* kernels_at(int64_t level) {
  if (level == BEST_LEVEL) level = best_level();
  if (level < 0 || level >= level_count() || !levels()[size_t(level)].lacks.empty()) return nullptr;
  return levels()[size_t(level)].kernels;
}

}  // namespace llmcore
