// Sizes of a lookup from its inputs, and what is refused.
#pragma once

#include "../lookup_sizes.h"
#include "ort.h"

namespace ultramem::ort {

// N and E of `table` and the node, D columns, T and K of the indices, C of the scores.
inline LookupSizes lookup_sizes(const Input& table, const Input& indices, const Input& scores, std::int64_t blocks,
                                std::int64_t columns, bool even_cores) {
  const LookupSizes size{table[0], columns, indices[0], indices[1], scores[2], blocks};
  scores.require_shape({size.t, size.k, size.c}, "[T,K] of indices, then C");
  if (size.c < 1 || size.d % size.c || (even_cores && size.d / size.c % 2)) {
    fail("scores must have a number of cores that divides the value dim ", size.d,
         even_cores ? ", into even parts for int4" : "", ", got ", size.c);
  }
  if (size.n > (std::int64_t{1} << 62) / blocks) fail("num_blocks times the rows must be at most 2^62, got ", blocks);
  return size;
}

// `bits` of a node with quantised rows, which its rows' type must bear out.
inline void require_bits(const Attributes& attributes, bool packed) {
  const std::int64_t bits = attributes.integer("bits"), expected = packed ? 4 : 8;
  if (bits != expected) fail("bits must be ", expected, " for rows of ", packed ? "uint8" : "int8", ", got ", bits);
}

}  // namespace ultramem::ort
