"""Body of the node GroupedMM in standard operators: a loop over experts, each of which multiplies its own rows.

T tokens sorted by expert, D inputs, I outputs, E experts.
"""

from __future__ import annotations

GROUPED_MM = """
GroupedMM (inputs, weights, ends) => (products)
{
  zero = Constant <value_int: int = 0> ()
  zeros = Constant <value_ints = [0]> ()
  last = Constant <value_ints = [-1]> ()
  true = Constant <value = bool {1}> ()
  ends_E = Cast <to: int = 7> (ends)
  but_last = Slice (ends_E, zeros, last, zeros)
  starts_E = Concat <axis: int = 0> (zeros, but_last)
  e = Size (ends_E)
  no_inputs_TD = Slice (inputs, zeros, zeros, zeros)
  any_weight_DI = Gather <axis: int = 0> (weights, zero)
  no_products_TI = MatMul (no_inputs_TD, any_weight_DI)
  products = Loop (e, true, no_products_TI) <body = one_expert (int64 index, bool on, before_TI) => (more, after_TI) {
    more = Identity (on)
    expert = Reshape (index, last)
    start = Gather <axis: int = 0> (starts_E, expert)
    end = Gather <axis: int = 0> (ends_E, expert)
    own_inputs_TD = Slice (inputs, start, end, zeros)
    weight_DI = Gather <axis: int = 0> (weights, index)
    own_products_TI = MatMul (own_inputs_TD, weight_DI)
    after_TI = Concat <axis: int = 0> (before_TI, own_products_TI)
  }>
}
"""
