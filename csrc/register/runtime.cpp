// Lends the kernels torch's own thread pool, so that a process has one (and one OpenMP runtime), and memory that is
// kept between calls, and tells them what the operating system knows of the caches.
#include <fstream>

#include "../register.h"
#include "../scratch_pool.h"
#include "../team.h"

namespace llmcore {
namespace {

void torch_threads(int64_t count, int64_t grain, Runtime::Body body, void* context) {
  if (by_team(count, grain, body, context)) return;
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

int64_t thread_count() {
  const int64_t of_team = team_threads();
  return of_team > 0 ? of_team : int64_t(torch::stable::get_num_threads());
}

// As Linux tells it ("32768K"). glibc's sysconf says ten times as much on an AMD machine of ours.
int64_t last_level_cache() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  int64_t kibibytes = 0;
  return file >> kibibytes && kibibytes > 0 && file.get() == 'K' ? kibibytes << 10 : runtime.cache_bytes;
}

const bool lent = [] {
  runtime.parallel_for = torch_threads;
  runtime.threads = thread_count;
  runtime.borrow = borrow_scratch;
  runtime.give_back = return_scratch;
  runtime.cache_bytes = last_level_cache();
  return true;
}();

}  // namespace
}  // namespace llmcore
