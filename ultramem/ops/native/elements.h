// Element types that C++ has no names for.
#pragma once

#include <cstdint>

namespace ultramem {

struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

}  // namespace ultramem
