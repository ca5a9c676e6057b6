// Lends the kernels torch's own thread pool, so that a process has one (and one OpenMP runtime), and tells them what
// the operating system knows of the caches.
#include <unistd.h>

#include "../register.h"

namespace llmcore {
namespace {

void torch_threads(int64_t count, int64_t grain, Runtime::Body body, void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

int64_t last_level_cache() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  if (const int64_t bytes = sysconf(_SC_LEVEL3_CACHE_SIZE); bytes > 0) return bytes;
#endif
  return runtime.cache_bytes;
}

const bool lent = [] {
  runtime.parallel_for = torch_threads;
  runtime.threads = [] { return int64_t(torch::stable::get_num_threads()); };
  runtime.cache_bytes = last_level_cache();
  return true;
}();

}  // namespace
}  // namespace llmcore
