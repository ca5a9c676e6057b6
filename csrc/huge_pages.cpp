#include "huge_pages.h"

#include <algorithm>
#include <map>
#if defined(__linux__)
#include <sys/mman.h>
#if !defined(MADV_COLLAPSE)
#define MADV_COLLAPSE 25  // Linux 6.1
#endif
#endif

namespace llmcore {

#if defined(__linux__)
int64_t into_huge_pages(const std::vector<std::pair<uintptr_t, int64_t>>& pieces) {
  constexpr uintptr_t PAGE = HUGE_PAGE;
  std::map<uintptr_t, uintptr_t> filled;  // bytes, by the page's address
  for (const auto& [begin, bytes] : pieces) {
    const uintptr_t end = begin + uintptr_t(bytes);
    for (uintptr_t page = begin / PAGE * PAGE; page < end; page += PAGE) {
      filled[page] += std::min(end, page + PAGE) - std::max(begin, page);
    }
  }
  int64_t moved = 0;
  for (const auto& [page, bytes] : filled) {
    // What cannot be moved, most files' pages or what is mapped in part only, stays as it is.
    if (bytes < PAGE / 4 || madvise(reinterpret_cast<void*>(page), PAGE, MADV_COLLAPSE) != 0) continue;
    moved += HUGE_PAGE;
  }
  return moved;
}

void ask_for_huge_pages(void* data, int64_t bytes) {
  constexpr uintptr_t PAGE = HUGE_PAGE;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / PAGE * PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), size_t(end - begin), MADV_HUGEPAGE);
}
#else
int64_t into_huge_pages(const std::vector<std::pair<uintptr_t, int64_t>>&) { return 0; }
void ask_for_huge_pages(void*, int64_t) {}
#endif

}  // namespace llmcore
