#include "scratch_pool.h"

#include <cstdlib>
#include <deque>
#include <mutex>
#include <thread>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "huge_pages.h"

namespace llmcore {
namespace {

constexpr int64_t SMALL = int64_t{64} << 10;  // the C library keeps these itself
constexpr int64_t PAGE = 4096;

int64_t kept_bytes() {
  static const int64_t bytes = (int64_t{32} << 20) + std::thread::hardware_concurrency() * (int64_t{4} << 20);
  return bytes;
}
bool is_kept(int64_t bytes) { return bytes > SMALL && bytes <= kept_bytes(); }

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

// As much of a large block in huge pages as there is without taking more: mapped by itself, for the C library would
// hand such pages on.
#if defined(__linux__)
bool is_mapped(int64_t bytes) { return bytes >= HUGE_PAGE; }

void* map(int64_t bytes) {
  const size_t whole = size_t(bytes + HUGE_PAGE);
  void* start = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  char* const first = static_cast<char*>(start);
  const size_t before = size_t(-reinterpret_cast<uintptr_t>(first) % uintptr_t(HUGE_PAGE));
  if (before > 0) munmap(first, before);
  munmap(first + before + bytes, whole - before - size_t(bytes));
  madvise(first + before, size_t(bytes / HUGE_PAGE * HUGE_PAGE), MADV_HUGEPAGE);
  return first + before;
}
void unmap(Memory memory) { munmap(memory.data, size_t(memory.bytes)); }
#else
bool is_mapped(int64_t) { return false; }
void* map(int64_t) { return nullptr; }
void unmap(Memory) {}
#endif

Memory allocate(int64_t bytes) {
  return {is_mapped(bytes) ? map(bytes) : std::aligned_alloc(64, size_t(bytes)), bytes};
}

void release(Memory memory) {
  if (memory.data != nullptr && is_mapped(memory.bytes)) return unmap(memory);
  std::free(memory.data);
}

}  // namespace

Memory borrow_scratch(int64_t bytes) {
  const int64_t unit = bytes > SMALL ? PAGE : 64, size = (bytes + unit - 1) / unit * unit;
  if (is_kept(size)) {
    const auto lock = locked_soon();
    auto& blocks = pool().blocks;
    auto found = blocks.end();  // the smallest, unless it is much too large
    for (auto block = blocks.begin(); lock && block != blocks.end(); ++block) {
      if (block->bytes < size || block->bytes > 8 * size) continue;
      if (found == blocks.end() || block->bytes < found->bytes) found = block;
    }
    if (found != blocks.end()) {
      const Memory memory = *found;
      blocks.erase(found);
      pool().bytes -= memory.bytes;
      return memory;
    }
  }
  return allocate(size);
}

void return_scratch(Memory memory) {
  if (is_kept(memory.bytes) && memory.data != nullptr) {
    const auto lock = locked_soon();
    if (lock) {
      auto& blocks = pool().blocks;
      for (; pool().bytes + memory.bytes > kept_bytes(); blocks.pop_front()) {
        pool().bytes -= blocks.front().bytes;
        release(blocks.front());
      }
      blocks.push_back(memory);
      pool().bytes += memory.bytes;
      return;
    }
  }
  release(memory);
}

void release_scratch() {
  const std::lock_guard lock(pool().mutex);
  for (const Memory& block : pool().blocks) release(block);
  pool().blocks.clear();
  pool().bytes = 0;
}

}  // namespace llmcore
