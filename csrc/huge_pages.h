// Memory that is read whole, again and again: the weights of a model. In pages of 4 KiB a core asks for nothing ahead
// beyond the end of a page, and each one's address has to be looked up. And large results, whose pages are cleared.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace llmcore {

constexpr int64_t HUGE_PAGE = int64_t{2} << 20;  // bytes

// Moves the huge pages' worth of memory that these pieces (address, bytes) fill by a quarter or more into huge pages,
// in place: addresses and contents stay. A quarter, for the weights of a packed model lie between what the C library
// has free. How many bytes lie in huge pages then; 0 where the system has no such call.
int64_t into_huge_pages(const std::vector<std::pair<uintptr_t, int64_t>>& pieces);

// Of memory that is not filled yet: the huge pages that lie in it as a whole shall come as such, at once, where the
// system gives them to who asks. It clears 2 MiB at a time then, in a third of the time.
void ask_for_huge_pages(void* data, int64_t bytes);

}  // namespace llmcore
