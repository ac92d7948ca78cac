// out[t,e] = sum over the slots k of token t in block e of concat_c(scores[t,k,c] * row(k)[core c])
#pragma once

#include <utility>

#include "lookup.h"
#include "permute_addresses.h"
#include "rows.h"

namespace ultramem {

// The slots of one token, those of a block together, each with its weight in each core.
template <class Rows, class Score>
class TokenSlots {
  using Acc = typename Rows::Acc;
  using Element = typename Rows::Element;

 public:
  TokenSlots(const LookupSizes& size, const Rows& table, const SlotIndices& indices, const Score* scores)
      : size_(size), table_(table), indices_(indices), scores_(scores), places_(new Place[at_least_one(size.k)]),
        slots_(new Slot[at_least_one(size.k)]), ends_(new std::int64_t[at_least_one(size.e)]),
        rows_(new const Element*[at_least_one(size.k)]), weights_(new Acc[at_least_one(size.k * size.c)]) {}

  // Find the rows, and touch each: looking up their pages takes long, and side by side in a short loop takes least.
  void find(std::int64_t token, std::int64_t first_column) {
    first_slot_ = token * size_.k;
    std::fill_n(ends_.get(), size_.e, 0);
    for (std::int64_t k = 0; k < size_.k; ++k) {
      places_[k] = locate(indices_[first_slot_ + k], size_.n);
      ++ends_[places_[k].block];
    }
    for (std::int64_t e = 0, sum = 0; e < size_.e; ++e) sum += std::exchange(ends_[e], sum);
    for (std::int64_t k = 0; k < size_.k; ++k) {
      const std::int64_t to = ends_[places_[k].block]++;
      rows_[to] = table_.row(places_[k].row);
      slots_[to] = {places_[k].row, k};
    }
    for (std::int64_t k = 0; k < size_.k; ++k) {
      __builtin_prefetch(rows_[k] + Rows::elements(first_column), 0, 3);
      table_.prefetch_scale(slots_[k].row);
    }
  }

  void weigh() {
    const Score* scores = scores_ + first_slot_ * size_.c;
    for (std::int64_t c = 0; c < size_.c; ++c) {
      for (std::int64_t k = 0; k < size_.k; ++k) {
        const Acc score = static_cast<Acc>(widen(scores[slots_[k].k * size_.c + c]));
        weights_[c * size_.k + k] = score * table_.scale(slots_[k].row);
      }
    }
  }

  const Element* const* rows() const { return rows_.get(); }
  const Acc* weights(std::int64_t core) const { return weights_.get() + core * size_.k; }
  // Where each block ends among the slots.
  const std::int64_t* ends() const { return ends_.get(); }

 private:
  static std::size_t at_least_one(std::int64_t count) { return static_cast<std::size_t>(std::max<std::int64_t>(count, 1)); }

  struct Slot {
    std::int64_t row, k;
  };

  const LookupSizes& size_;
  const Rows& table_;
  const SlotIndices& indices_;
  const Score* scores_;
  std::int64_t first_slot_ = 0;
  std::unique_ptr<Place[]> places_;
  std::unique_ptr<Slot[]> slots_;
  std::unique_ptr<std::int64_t[]> ends_;
  std::unique_ptr<const Element*[]> rows_;
  std::unique_ptr<Acc[]> weights_;
};

// Rows to ask for while others are added up: slot k asks for slot k + kSlotsAhead of the same part, or, past the last
// slot, for the first ones of the part that comes next, which may be the next token's.
template <class Rows>
struct Ahead {
  using Element = typename Rows::Element;

  const Element *const *rows, *const *next_rows;
  std::int64_t slots, distance, offset, next_offset;

  Ahead(const Element* const* these, const Element* const* those, std::int64_t k, std::int64_t here, std::int64_t there)
      : rows(these), next_rows(those), slots(k), distance(std::min(k, kSlotsAhead)), offset(here), next_offset(there) {}

  ULTRAMEM_INLINE void fetch(std::int64_t k) const {
    const std::int64_t ahead = k + distance;
    const Element* row = ahead < slots ? rows[ahead] + offset : next_rows[ahead - slots] + next_offset;
    for (std::int64_t line = 0; line < bytes_of<Rows>(Rows::kPartColumns); line += kLineBytes) {
      __builtin_prefetch(reinterpret_cast<const char*>(row) + line, 0, 3);
    }
  }
};

// `count` vectors of every block's columns from `column` on; 0: `rest` columns, less than a vector.
template <std::int64_t count, bool fetches, class Rows, class Score, class Out>
void pool_columns(const LookupSizes& size, const TokenSlots<Rows, Score>& token, std::int64_t core, std::int64_t column,
                  std::int64_t rest, const Ahead<Rows>& ahead, Out* out) {
  using Acc = typename Rows::Acc;
  constexpr std::int64_t width = kLanes<Acc>;
  const auto* const* rows = token.rows();
  const Acc* weights = token.weights(core);
  const std::int64_t offset = Rows::elements(column);
  std::int64_t k = 0;
  for (std::int64_t e = 0; e < size.e; ++e, out += size.d) {
    Vector<Acc> sums[count ? count : 1] = {};
    for (const std::int64_t end = token.ends()[e]; k < end; ++k) {
      if constexpr (fetches) ahead.fetch(k);
      const auto* row = rows[k] + offset;
      const Vector<Acc> weight = broadcast(weights[k]);
      if constexpr (count == 0) {
        sums[0] += weight * Rows::lanes(row, rest);
      } else {
#pragma GCC unroll 16  // else the sums are in memory
        for (std::int64_t i = 0; i < count; ++i) sums[i] += weight * Rows::lanes(row + Rows::elements(i * width));
      }
    }
    if constexpr (count == 0) {
      store_first(out + column, sums[0], rest);
    } else {
      for (std::int64_t i = 0; i < count; ++i) store(out + column + i * width, sums[i]);
    }
  }
}

template <class Rows, class Score, class Out>
void pool_part(const LookupSizes& size, const TokenSlots<Rows, Score>& token, const Part& part,
               const Ahead<Rows>& ahead, Out* out) {
  constexpr std::int64_t width = kLanes<typename Rows::Acc>, most = std::min(Rows::kPartColumns / width, kMostVectors);
  std::int64_t column = part.begin;
  const auto pool = [&](auto count) {
    const bool fetches = column == part.begin;  // once a part
    (fetches ? pool_columns<count(), true, Rows, Score, Out> : pool_columns<count(), false, Rows, Score, Out>)(
        size, token, part.core, column, part.end - column, ahead, out);
    column += count() * width;
  };
  while (column + most * width <= part.end) pool(std::integral_constant<std::int64_t, most>{});
  if constexpr (most > 4) {
    while (column + 4 * width <= part.end) pool(std::integral_constant<std::int64_t, 4>{});
  }
  while (column + width <= part.end) pool(std::integral_constant<std::int64_t, 1>{});
  if (column < part.end) pool(std::integral_constant<std::int64_t, 0>{});
}

template <class Rows, class Score, class Out>
void pool_tokens(const LookupSizes& size, const Rows& table, const SlotIndices& indices, const Score* scores, Out* out,
                 Range tokens, Range columns) {
  using Element = typename Rows::Element;
  const std::vector<Part> parts = parts_of<Rows>(size, columns);
  TokenSlots<Rows, Score> slots[2] = {{size, table, indices, scores}, {size, table, indices, scores}};
  slots[tokens.begin & 1].find(tokens.begin, columns.begin);
  for (std::int64_t token = tokens.begin; token < tokens.end; ++token) {
    TokenSlots<Rows, Score>&here = slots[token & 1], &next = slots[(token + 1) & 1];
    const bool last_token = token + 1 == tokens.end;
    if (!last_token) next.find(token + 1, columns.begin);
    here.weigh();
    for (std::size_t p = 0; p < parts.size(); ++p) {
      const bool last_part = p + 1 == parts.size();
      const Element* const* then = last_part && !last_token ? next.rows() : here.rows();
      const Part& part_then = last_part ? (last_token ? parts[p] : parts[0]) : parts[p + 1];
      const Ahead<Rows> ahead(here.rows(), then, size.k, Rows::elements(parts[p].begin), Rows::elements(part_then.begin));
      pool_part(size, here, parts[p], ahead, out + token * size.e * size.d);
    }
  }
}

template <class Rows, class Score, class Out, class Parallel>
void lookup_reduce(const LookupSizes& size, const Rows& table, const SlotIndices& indices, const Score* scores, Out* out,
                   const Parallel& parallel) {
  const TokenGrid grid(size.t, size.d, Rows::kLineColumns, parallel.threads());
  grid.run(parallel, size.k * bytes_of<Rows>(size.d), [&](Range tokens, Range columns) {
    pool_tokens(size, table, indices, scores, out, tokens, columns);
  });
}

}  // namespace ultramem
