#include "team.h"

#include <atomic>
#include <thread>

namespace llmcore {
namespace {

constexpr int SPINS = 4000;  // of some 40 cycles, before the core is offered to others at each one

void wait_a_little(int& tries) {
  if (++tries > SPINS) return std::this_thread::yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads < MOST ? threads : MOST) {}

  int64_t threads() const { return threads_; }

  // On the leading thread.
  void run(int64_t count, int64_t grain, Runtime::Body body, void* context) {
    const int64_t wanted = grain < 1 ? threads_ : (count + grain - 1) / grain;
    const int64_t most = wanted < threads_ ? wanted : threads_;
    if (most <= 1 || is_running_) return body(0, count, context);
    part_ = {count, (count + most - 1) / most, body, context};
    const int64_t parts = (count + part_.length - 1) / part_.length;
    done_.store(0, std::memory_order_relaxed);
    is_running_ = true;
    // The first part is the leader's: what a thread has in its caches is then of use to it again.
    next_.store(++turn_ << 32 | uint64_t(parts) << 16 | 1, std::memory_order_release);
    work(0);
    while (take()) continue;
    is_running_ = false;
    for (int tries = 0; done_.load(std::memory_order_acquire) < parts;) wait_a_little(tries);
  }

  void end() { next_.store(ENDED, std::memory_order_release); }

  // On the others, until the end.
  void follow() {
    for (int tries = 0; next_.load(std::memory_order_relaxed) != ENDED;) {
      if (take()) {
        tries = 0;
      } else {
        wait_a_little(tries);
      }
    }
  }

 private:
  static constexpr int64_t MOST = 0xffff;
  static constexpr uint64_t ENDED = ~uint64_t{0};

  // One part, if there is one left.
  bool take() {
    uint64_t next = next_.load(std::memory_order_relaxed);
    do {
      if (next == ENDED || (next & 0xffff) == (next >> 16 & 0xffff)) return false;
    } while (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acquire, std::memory_order_relaxed));
    work(int64_t(next & 0xffff));
    return true;
  }

  // On who has taken this part: the leader waits for it, so that nothing changes until it is done.
  void work(int64_t number) {
    const int64_t begin = number * part_.length, end = begin + part_.length;
    part_.body(begin, end < part_.count ? end : part_.count, part_.context);
    done_.fetch_add(1, std::memory_order_release);
  }

  struct Part {
    int64_t count, length;
    Runtime::Body body;
    void* context;
  };
  const int64_t threads_;
  Part part_{};
  bool is_running_ = false;
  uint64_t turn_ = 0;
  // The turn, how many parts it has, and the next one: in one word, so that no part of a turn is taken for another's.
  alignas(64) std::atomic<uint64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

thread_local Team* led = nullptr;

}  // namespace

void as_team(decltype(Runtime::parallel_for) parallel_for, int64_t threads, void (*body)(void*), void* context) {
  if (led != nullptr || threads <= 1) return body(context);
  struct Call {
    Team team;
    void (*body)(void*);
    void* context;
  } call{Team(threads), body, context};
  const auto join = [](int64_t begin, int64_t end, void* of_call) {
    Call& call = *static_cast<Call*>(of_call);
    if (begin == 0) {
      led = &call.team;
      call.body(call.context);
      led = nullptr;
      call.team.end();
    } else if (begin < end) {
      call.team.follow();
    }
  };
  parallel_for(threads, 1, join, &call);
}

bool by_team(int64_t count, int64_t grain, Runtime::Body body, void* context) {
  if (led == nullptr) return false;
  led->run(count, grain, body, context);
  return true;
}

int64_t team_threads() { return led == nullptr ? 0 : led->threads(); }

}  // namespace llmcore
