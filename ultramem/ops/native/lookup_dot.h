// out[t,k,c] = <queries[t, block of the slot][core c], row of the slot[core c]>
#pragma once

#include "lookup.h"

namespace ultramem {

template <class Acc>
ULTRAMEM_INLINE Acc sum_of(Vector<Acc> lanes) {
  Acc sum = 0;
  for (int lane = 0; lane < kLanes<Acc>; ++lane) sum += lanes[lane];
  return sum;
}

// <row, query> over `count` columns.
template <class Value, class Acc = Accumulator<Value>>
ULTRAMEM_INLINE Acc dot(const Value* row, const Value* query, std::int64_t count) {
  constexpr std::int64_t width = kLanes<Acc>;
  Vector<Acc> sums[4] = {};  // as many as hide the latency of an addition
  std::int64_t x = 0;
  for (; x + 4 * width <= count; x += 4 * width) {
    for (int i = 0; i < 4; ++i) sums[i] += load(row + x + i * width) * load(query + x + i * width);
  }
  for (; x + width <= count; x += width) sums[0] += load(row + x) * load(query + x);
  if (x < count) sums[1] += load_first(row + x, count - x) * load_first(query + x, count - x);
  return sum_of<Acc>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Slots ahead whose rows are on their way while whole rows are read.
constexpr std::int64_t kMostAhead = 16;
inline std::int64_t rows_ahead(std::int64_t row_bytes) {
  return std::clamp<std::int64_t>(4096 / std::max<std::int64_t>(row_bytes, 1), 2, kMostAhead);
}

// `blocked`: queries are [T,E,D], one for each block of a token; else [T,D], whatever the block.
template <bool blocked, class Value, class Out, class Parallel>
void lookup_dot(const LookupSizes& size, const Value* values, const std::int64_t* indices, const Value* queries,
                Out* out, const Parallel& parallel) {
  const std::int64_t core_columns = size.d / size.c, slots = size.t * size.k;
  const std::int64_t row_bytes = size.d * static_cast<std::int64_t>(sizeof(Value)), ahead = rows_ahead(row_bytes);
  parallel(slots, std::max<std::int64_t>(kBytesWorthAThread / std::max<std::int64_t>(row_bytes, 1), 1),
           [&](std::int64_t begin, std::int64_t end) {
    Place places[kMostAhead];
    std::int64_t next = begin;
    const auto fetch = [&] {
      const Place place = places[next % kMostAhead] = locate(indices[next], size.n);
      prefetch(values + place.row * size.d, row_bytes);
      ++next;
    };
    while (next < std::min(end, begin + ahead)) fetch();
    for (std::int64_t slot = begin; slot < end; ++slot) {
      const Place place = places[slot % kMostAhead];
      if (next < end) fetch();
      const Value* row = values + place.row * size.d;
      const std::int64_t token = slot / size.k;
      const Value* query = queries + (blocked ? token * size.e + place.block : token) * size.d;
      for (std::int64_t c = 0; c < size.c; ++c) {
        narrow(dot(row + c * core_columns, query + c * core_columns, core_columns), out[slot * size.c + c]);
      }
    }
  });
}

}  // namespace ultramem
