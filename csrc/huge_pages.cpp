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
#else
int64_t into_huge_pages(const std::vector<std::pair<uintptr_t, int64_t>>&) { return 0; }
#endif

}  // namespace llmcore
