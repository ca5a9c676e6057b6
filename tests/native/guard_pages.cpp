// new[] in pages of their own, for the program exercise: an array ends where a page begins that may not be touched, or,
// with LLMCORE_GUARD=start, begins where such a page ends. One byte too far, read or written, by whatever instruction,
// ends the process. (A sanitizer sees what it has instrumented, and not what an optimised build does.)
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

constexpr size_t PAGE = 4096;

uint8_t* page_of(void* p) { return reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(p) & ~uintptr_t(PAGE - 1)); }

// Pages: a forbidden one, which keeps the size of all of them; the array's; another forbidden one. An array begins
// inside its first page, or, being empty, at the second forbidden one.
void* guarded(size_t size) {
  static const char* side = std::getenv("LLMCORE_GUARD");
  const size_t pages = (size + PAGE - 1) / PAGE, whole = (pages + 2) * PAGE;
  void* mapped = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) std::abort();
  uint8_t* first = static_cast<uint8_t*>(mapped);
  std::memcpy(first, &whole, sizeof whole);
  uint8_t* last = first + whole - PAGE;
  if (mprotect(first, PAGE, PROT_NONE) != 0 || mprotect(last, PAGE, PROT_NONE) != 0) std::abort();
  const bool at_start = side != nullptr && std::strcmp(side, "start") == 0;
  return at_start ? first + PAGE : last - size;
}

void release(void* p) {
  if (p == nullptr) return;
  uint8_t* first = page_of(p) - PAGE;
  size_t whole;
  if (mprotect(first, PAGE, PROT_READ) != 0) std::abort();
  std::memcpy(&whole, first, sizeof whole);
  munmap(first, whole);
}

}  // namespace

void* operator new[](size_t size) { return guarded(size); }
void operator delete[](void* p) noexcept { release(p); }
void operator delete[](void* p, size_t) noexcept { release(p); }
