// Threads that stay together for a call of many parallel parts, a model's pass: between parts they wait for the next
// one instead of being started anew.
//
// GNU's OpenMP, whose threads torch's are, lets its threads spin between two parallel regions, but in a process where
// they are more than the cores (a second thread that ever computed something with torch is enough, or another library
// with threads of OpenMP), it puts them to sleep at once: waking them some hundred times takes a third of a token's
// time. A part costs less here in any case, and one whose thread is not running is done by the others.
#pragma once

#include "ops.h"

namespace llmcore {

// body(context), once, on one of `threads` threads of parallel_for, while the others wait for its parts.
void as_team(decltype(Runtime::parallel_for) parallel_for, int64_t threads, void (*body)(void* context), void* context);
// body(), likewise.
template <class F>
void as_team(decltype(Runtime::parallel_for) parallel_for, int64_t threads, const F& body) {
  as_team(
      parallel_for, threads, [](void* context) { (*static_cast<const F*>(context))(); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// What parallel_for does, by the threads of the team that this thread leads; false: it leads none, nothing was done.
bool by_team(int64_t count, int64_t grain, Runtime::Body body, void* context);

// Of the team that this thread leads; 0: it leads none.
int64_t team_threads();

}  // namespace llmcore
