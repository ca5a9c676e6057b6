// What one step along the inner axis of a product adds to a vector of sums. A lane of either operand holds VALUES
// neighbours along that axis.
#pragma once

#include <type_traits>

#include "vec.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

struct FloatProducts {
  static constexpr int64_t VALUES = 1;
  INLINE static vec add(vec sum, vec a, vec b) { return fma(a, b, sum); }
};
struct PairProducts {  // of bfloat16
  static constexpr int64_t VALUES = 2;
  INLINE static vec add(vec sum, vec a, vec b) { return add_pair_products(sum, a, b); }
};
// bfloat16 meets bfloat16 in pairs where the CPU multiplies those.
template <class A, class B = A>
using ProductsOf = std::conditional_t<HAS_BFLOAT16_PAIRS && std::is_same_v<A, bfloat16> && std::is_same_v<B, bfloat16>,
                                      PairProducts, FloatProducts>;

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
