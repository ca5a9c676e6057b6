// Work over threads, and each thread's scratch memory.
#pragma once

#include "../ops.h"
#include "vec.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// body(begin, end) on disjoint ranges that cover [0, count). Which thread runs what never changes a result: a body
// reduces only inside its own range, or into slots that are summed later in a fixed order.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& body) {
  if (count <= 0) return;
  if (count <= grain) return body(int64_t{0}, count);
  runtime.parallel_for(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// The same for bodies that may store past the caches: who reads a result then finds it there.
template <class F>
void parallel_stores(int64_t count, int64_t grain, const F& body) {
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    body(begin, end);
    order_stores();
  });
}

// Rows of `width` elements over threads: below about 32k elements a second thread costs more than it saves.
template <class F>
void parallel_rows(int64_t rows, int64_t width, const F& body) {
  const int64_t grain = 32768 / (width + 1) + 1;
  parallel_stores(rows, grain, body);
}

// 64-byte aligned memory for one call, given back with it. `ok()` is false when there was none.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(runtime.borrow((floats + 1) * int64_t(sizeof(float)))) {}
  ~Scratch() { runtime.give_back(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  bool ok() const { return memory_.data != nullptr; }
  float* data() const { return static_cast<float*>(memory_.data); }

 private:
  Memory memory_;
};

// Something that went wrong on some thread.
class Failure {
 public:
  void set() { __atomic_store_n(&happened_, true, __ATOMIC_RELAXED); }
  bool happened() const { return __atomic_load_n(&happened_, __ATOMIC_RELAXED); }

 private:
  bool happened_ = false;
};

// body(next) on every thread, or in this one `alone`: next() gives each task in [0, count) to exactly one caller, in
// order, and -1 when there are none left. For tasks of unequal length.
template <class F>
void parallel_tasks(int64_t count, const F& body, bool alone = false) {
  int64_t taken = 0;
  const auto next = [&] {
    const int64_t task = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
    return task < count ? task : int64_t{-1};
  };
  if (alone) return body(next);
  const int64_t threads = count < runtime.threads() ? count : runtime.threads();
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(next);
  });
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
