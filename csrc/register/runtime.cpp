// Lends the kernels torch's own thread pool, so that a process has one (and one OpenMP runtime).
#include "../register.h"

namespace llmcore {
namespace {

void torch_threads(int64_t count, int64_t grain, Runtime::Body body, void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

const bool lent = [] {
  runtime.parallel_for = torch_threads;
  runtime.threads = [] { return int64_t(torch::stable::get_num_threads()); };
  return true;
}();

}  // namespace
}  // namespace llmcore
