// What all lookups share: the sizes, where a virtual index points, and how work is cut for threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace ultramem {

// N rows of D columns, T tokens of K slots, C cores, E blocks.
struct LookupSizes {
  std::int64_t n, d, t, k, c, e;
};

struct Place {
  std::int64_t row, block;
};

ULTRAMEM_INLINE Place locate(std::int64_t index, std::int64_t n) {
  const std::int64_t block = index / n;
  return {index - block * n, block};
}

struct Range {
  std::int64_t begin, end;
};

// Rows that are on their way while one is added up: enough lines in flight to cover the latency of memory, few enough
// that they are still in the first-level cache when their turn comes.
constexpr std::int64_t kMaxAhead = 16;
ULTRAMEM_INLINE std::int64_t rows_ahead(std::int64_t row_bytes) {
  return std::clamp<std::int64_t>(8192 / std::max<std::int64_t>(row_bytes, 1), 2, kMaxAhead);
}

// Tokens x column parts, so that a single token keeps every thread busy too. A part is made of whole cache lines, so
// that a column is always computed alike.
struct TokenGrid {
  std::int64_t tokens, parts, columns, columns_a_part;

  TokenGrid(std::int64_t t, std::int64_t d, std::int64_t element_bytes, int threads) : tokens(t), columns(d) {
    const std::int64_t line = kLineBytes / element_bytes;
    const std::int64_t lines = std::max<std::int64_t>((d + line - 1) / line, 1);
    parts = 1;
    if (t > 0 && t < 8 * threads) {
      while (t * parts % threads != 0) ++parts;
      parts = std::min(parts, lines);
    }
    columns_a_part = (lines + parts - 1) / parts * line;
    parts = std::max<std::int64_t>((d + columns_a_part - 1) / columns_a_part, 1);
  }

  // f(tokens, columns) for each part of the work.
  template <class Parallel, class F>
  void run(const Parallel& parallel, std::int64_t bytes_a_token, const F& f) const {
    constexpr std::int64_t kBytesWorthAThread = 16384;  // waking one costs about as long as reading these
    const std::int64_t grain = std::max<std::int64_t>(kBytesWorthAThread * parts / std::max<std::int64_t>(bytes_a_token, 1), 1);
    parallel(tokens * parts, grain, [&](std::int64_t begin, std::int64_t end) {
      // Part by part, and within a part token by token.
      while (begin < end) {
        const std::int64_t part = begin / tokens;
        const std::int64_t stop = std::min(end, (part + 1) * tokens);
        const std::int64_t first = part * columns_a_part;
        f(Range{begin - part * tokens, stop - part * tokens}, Range{first, std::min(columns, first + columns_a_part)});
        begin = stop;
      }
    });
  }
};

}  // namespace ultramem
