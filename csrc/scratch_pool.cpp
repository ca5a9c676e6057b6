#include "scratch_pool.h"

#include <cstdlib>
#include <deque>
#include <mutex>
#include <thread>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llmcore {
namespace {

constexpr int64_t SMALL = int64_t{64} << 10;  // the C library keeps these itself
constexpr int64_t HUGE_PAGE = int64_t{2} << 20;

int64_t kept_bytes() {
  static const int64_t bytes = (int64_t{32} << 20) + std::thread::hardware_concurrency() * (int64_t{4} << 20);
  return bytes;
}

// Blocks that nobody has, the longest unused first.
struct Pool {
  std::mutex mutex;
  std::deque<Memory> blocks;
  int64_t bytes = 0;
};
Pool& pool() {
  static Pool& all = *new Pool;  // never destroyed: a thread may outlive static objects
  return all;
}

// Nobody waits for long, as the child of a fork would for a lock that was held then: memory is taken from the C library
// instead, and given back to it.
std::unique_lock<std::mutex> locked_soon() {
  std::unique_lock lock(pool().mutex, std::try_to_lock);
  for (int tries = 0; !lock && tries < 1000; ++tries) lock.try_lock();
  return lock;
}

// Sizes in eighths of a power of two, so that a block serves requests of about its size.
int64_t block_size(int64_t bytes) {
  int64_t step = 64;
  while (step * 16 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

// As much of it in huge pages as there is without taking more.
Memory allocate(int64_t bytes) {
  if (bytes < HUGE_PAGE) return {std::aligned_alloc(64, size_t(bytes)), bytes};
  void* data = std::aligned_alloc(HUGE_PAGE, size_t(bytes));
#if defined(__linux__)
  if (data != nullptr) madvise(data, size_t(bytes / HUGE_PAGE * HUGE_PAGE), MADV_HUGEPAGE);
#endif
  return {data, bytes};
}

}  // namespace

Memory borrow_scratch(int64_t bytes) {
  const int64_t size = block_size(bytes < 64 ? 64 : bytes);
  if (size > SMALL && size <= kept_bytes()) {
    const auto lock = locked_soon();
    auto& blocks = pool().blocks;
    for (auto block = blocks.rbegin(); lock && block != blocks.rend(); ++block) {
      if (block->bytes < size || block->bytes > 2 * size) continue;
      const Memory found = *block;
      blocks.erase(std::next(block).base());
      pool().bytes -= found.bytes;
      return found;
    }
  }
  return allocate(size);
}

void return_scratch(Memory memory) {
  if (memory.bytes > SMALL && memory.bytes <= kept_bytes() && memory.data != nullptr) {
    const auto lock = locked_soon();
    if (lock) {
      auto& blocks = pool().blocks;
      for (; pool().bytes + memory.bytes > kept_bytes(); blocks.pop_front()) {
        pool().bytes -= blocks.front().bytes;
        std::free(blocks.front().data);
      }
      blocks.push_back(memory);
      pool().bytes += memory.bytes;
      return;
    }
  }
  std::free(memory.data);
}

void release_scratch() {
  const std::lock_guard lock(pool().mutex);
  for (const Memory& block : pool().blocks) std::free(block.data);
  pool().blocks.clear();
  pool().bytes = 0;
}

}  // namespace llmcore
