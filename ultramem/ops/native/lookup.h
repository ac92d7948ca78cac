// What all lookups share: the sizes, where a virtual index points, and how work is cut for threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "lookup_sizes.h"
#include "simd.h"

namespace ultramem {

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

// A row is read in parts of this many bytes, one pass over a token's slots for each part, and the parts of this many
// slots ahead are on their way. Processors fetch lines beyond those that are asked for: here they belong to the next
// part instead of to nobody. A part is also what fits in registers while the rows of a block are added up.
constexpr std::int64_t kPartBytes = 256;
constexpr std::int64_t kSlotsAhead = 16;

// The columns [begin, end) of one core, at most Rows::kPartColumns.
struct Part {
  std::int64_t core, begin, end;
};

template <class Rows>
std::vector<Part> parts_of(const LookupSizes& size, Range columns) {
  const std::int64_t core_columns = size.d / size.c;
  std::vector<Part> parts;
  for (std::int64_t begin = columns.begin; begin < columns.end; begin = parts.back().end) {
    const std::int64_t core = begin / core_columns;
    parts.push_back({core, begin, std::min({columns.end, (core + 1) * core_columns, begin + Rows::kPartColumns})});
  }
  return parts;
}

constexpr std::int64_t kBytesWorthAThread = 16384;  // waking a thread takes about as long as reading these

// Tokens x column ranges, so that a single token keeps every thread busy too. A range is made of whole cache lines of
// a row (`line`: columns of one), so that a column is computed alike however the work is cut.
class TokenGrid {
 public:
  TokenGrid(std::int64_t tokens, std::int64_t columns, std::int64_t line, int threads)
      : tokens_(tokens), columns_(columns) {
    const std::int64_t lines = std::max<std::int64_t>((columns + line - 1) / line, 1);
    std::int64_t ranges = 1;
    if (tokens > 0 && tokens < 8 * threads) {
      while (tokens * ranges % threads != 0) ++ranges;
      ranges = std::min(ranges, lines);
    }
    columns_a_range_ = (lines + ranges - 1) / ranges * line;
    ranges_ = std::max<std::int64_t>((columns + columns_a_range_ - 1) / columns_a_range_, 1);
  }

  // f(tokens, columns) for each piece of the work.
  template <class Parallel, class F>
  void run(const Parallel& parallel, std::int64_t bytes_a_token, const F& f) const {
    const std::int64_t bytes = std::max<std::int64_t>(bytes_a_token / ranges_, 1);
    const std::int64_t grain = std::max<std::int64_t>(kBytesWorthAThread / bytes, 1);
    parallel(tokens_ * ranges_, grain, [&](std::int64_t begin, std::int64_t end) {
      while (begin < end) {
        const std::int64_t range = begin / tokens_, first = range * columns_a_range_;
        const std::int64_t stop = std::min(end, (range + 1) * tokens_);
        f(Range{begin - range * tokens_, stop - range * tokens_}, Range{first, std::min(columns_, first + columns_a_range_)});
        begin = stop;
      }
    });
  }

 private:
  std::int64_t tokens_, columns_, ranges_, columns_a_range_;
};

}  // namespace ultramem
