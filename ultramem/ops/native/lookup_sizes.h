// The sizes of a lookup.
#pragma once

#include <cstdint>

namespace ultramem {

// N rows of D columns, T tokens of K slots, C cores, E blocks.
struct LookupSizes {
  std::int64_t n, d, t, k, c, e;
};

}  // namespace ultramem
