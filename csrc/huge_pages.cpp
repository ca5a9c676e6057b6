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
  constexpr uintptr_t HUGE_PAGE = uintptr_t{2} << 20;
  std::map<uintptr_t, uintptr_t> filled;  // bytes, by the page's address
  for (const auto& [begin, bytes] : pieces) {
    const uintptr_t end = begin + uintptr_t(bytes);
    for (uintptr_t page = begin / HUGE_PAGE * HUGE_PAGE; page < end; page += HUGE_PAGE) {
      filled[page] += std::min(end, page + HUGE_PAGE) - std::max(begin, page);
    }
  }
  int64_t moved = 0;
  for (const auto& [page, bytes] : filled) {
    // What cannot be moved, most files' pages or what is mapped in part only, stays as it is.
    if (bytes < HUGE_PAGE / 4 || madvise(reinterpret_cast<void*>(page), HUGE_PAGE, MADV_COLLAPSE) != 0) continue;
    moved += int64_t(HUGE_PAGE);
  }
  return moved;
}
#else
int64_t into_huge_pages(const std::vector<std::pair<uintptr_t, int64_t>>&) { return 0; }
#endif

}  // namespace llmcore
