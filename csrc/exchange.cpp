#include "exchange.h"

#include <atomic>
#include <chrono>
#include <system_error>
#include <thread>
#if defined(__linux__)
#include <sched.h>
#endif

namespace llmcore {
namespace {

#if defined(__linux__)
bool move_to(int64_t cpu) {
  if (cpu < 0 || cpu >= CPU_SETSIZE) return false;
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(size_t(cpu), &only);
  return sched_setaffinity(0, sizeof(only), &only) == 0;
}
#else
bool move_to(int64_t) { return false; }
#endif

}  // namespace

double exchange_seconds(int64_t one, int64_t other) {
  if (one == other) return -1.0;  // they would wait for each other's time slices
  constexpr int64_t TURNS = 20000;
  alignas(128) std::atomic<int64_t> turn{0};
  std::atomic<bool> failed{false};
  double seconds = 0.0;
  const auto play = [&](int64_t cpu, int64_t first) {
    if (!move_to(cpu)) failed = true;
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t t = first; t < 2 * TURNS; t += 2) {
      while (turn.load(std::memory_order_acquire) != t && !failed) {
      }
      turn.store(t + 1, std::memory_order_release);
    }
    if (first == 0) {
      seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / double(2 * TURNS);
    }
  };
  std::thread players[2];
  try {
    players[0] = std::thread(play, other, 1);
    players[1] = std::thread(play, one, 0);
  } catch (const std::system_error&) {
    failed = true;  // which ends the wait of the other
  }
  for (std::thread& player : players) {
    if (player.joinable()) player.join();
  }
  return failed ? -1.0 : seconds;
}

}  // namespace llmcore
