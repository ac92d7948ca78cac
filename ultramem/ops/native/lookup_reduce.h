// out[t,e] = sum over the slots k of token t in block e of concat_c(scores[t,k,c] * row(k)[core c])
#pragma once

#include <memory>

#include "lookup.h"

namespace ultramem {

// sums[begin..end) += weight * row[begin..end)
template <class Value, class Acc>
ULTRAMEM_INLINE void add_weighted(Acc* sums, const Value* row, Acc weight, Range columns) {
  constexpr std::int64_t lanes = kLanes<Acc>;
  const Vector<Acc> weights = broadcast(weight);
  std::int64_t x = columns.begin;
  for (; x + lanes <= columns.end; x += lanes) store(sums + x, load(sums + x) + weights * load(row + x));
  if (const std::int64_t rest = columns.end - x; rest > 0) {
    store_first(sums + x, load_first(sums + x, rest) + weights * load_first(row + x, rest), rest);
  }
}

template <class Acc, class Value>
ULTRAMEM_INLINE void convert(const Acc* from, Value* to, std::int64_t count) {
  constexpr std::int64_t lanes = kLanes<Acc>;
  std::int64_t x = 0;
  for (; x + lanes <= count; x += lanes) store(to + x, load(from + x));
  if (x < count) store_first(to + x, load_first(from + x, count - x), count - x);
}

// Pool `columns` of `tokens`. Each row is read once, whatever its block and core.
template <class Value, class Score>
void pool_rows(const LookupSizes& size, const Value* values, const std::int64_t* indices, const Score* scores,
               Value* out, Range tokens, Range columns) {
  using Acc = Accumulator<Value>;
  constexpr bool in_place = std::is_same_v<Value, Acc>;
  const std::int64_t core_columns = size.d / size.c, width = columns.end - columns.begin;
  const std::int64_t first_core = columns.begin / core_columns;
  const std::int64_t row_bytes = width * static_cast<std::int64_t>(sizeof(Value)), ahead = rows_ahead(row_bytes);
  std::unique_ptr<Acc[]> scratch(in_place ? nullptr : new Acc[static_cast<std::size_t>(size.e * size.d)]);

  Place places[kMaxAhead];
  const std::int64_t end = tokens.end * size.k;
  std::int64_t next = tokens.begin * size.k;
  const auto fetch = [&] {
    const Place place = locate(indices[next], size.n);
    prefetch(values + place.row * size.d + columns.begin, row_bytes);
    places[next++ % kMaxAhead] = place;
  };
  for (std::int64_t i = 0; i < ahead && next < end; ++i) fetch();

  std::int64_t slot = tokens.begin * size.k;
  for (std::int64_t token = tokens.begin; token < tokens.end; ++token) {
    Value* pooled = out + token * size.e * size.d;
    Acc* sums;
    if constexpr (in_place) sums = pooled;
    else sums = scratch.get();
    for (std::int64_t e = 0; e < size.e; ++e) std::fill_n(sums + e * size.d + columns.begin, width, Acc(0));
    for (std::int64_t k = 0; k < size.k; ++k, ++slot) {
      const Place place = places[slot % kMaxAhead];
      if (next < end) fetch();
      const Value* row = values + place.row * size.d;
      const Score* score = scores + slot * size.c;
      Acc* block = sums + place.block * size.d;
      std::int64_t begin = columns.begin;
      for (std::int64_t core = first_core; begin < columns.end; ++core) {
        const std::int64_t stop = std::min(columns.end, (core + 1) * core_columns);
        add_weighted(block, row, static_cast<Acc>(widen(score[core])), Range{begin, stop});
        begin = stop;
      }
    }
    if constexpr (!in_place) {
      for (std::int64_t e = 0; e < size.e; ++e) {
        convert(sums + e * size.d + columns.begin, pooled + e * size.d + columns.begin, width);
      }
    }
  }
}

template <class Value, class Score, class Parallel>
void lookup_reduce(const LookupSizes& size, const Value* values, const std::int64_t* indices, const Score* scores,
                   Value* out, const Parallel& parallel) {
  const TokenGrid grid(size.t, size.d, sizeof(Value), parallel.threads());
  grid.run(parallel, size.k * size.d * static_cast<std::int64_t>(sizeof(Value)), [&](Range tokens, Range columns) {
    pool_rows(size, values, indices, scores, out, tokens, columns);
  });
}

}  // namespace ultramem
