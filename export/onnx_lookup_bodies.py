"""Bodies of the lookups' ONNX nodes, in standard operators: the text of `onnx.parser`.

`{sum}` is the number of the type in which scores and rows are added up (TensorProto.FLOAT or DOUBLE), so that a half
precision table gives what the ops give. No operator reshapes a table: runtimes fold that into a second copy of it.
"""

from __future__ import annotations

_LOOKUP_DOT = """
LookupDot (rows, indices, query) => (dots)
{
  n = Shape <start: int = 0, end: int = 1> (rows)
  row_TK = Mod (indices, n)
  looked_up_TKD = Gather <axis: int = 0> (rows, row_TK)
  rows_TKD = Cast <to: int = {sum}> (looked_up_TKD)
  query_TD = Cast <to: int = {sum}> (query)
  last = Constant <value_ints = [-1]> ()
  query_TD1 = Unsqueeze (query_TD, last)
  dots_TK1 = MatMul (rows_TKD, query_TD1)
  dots_TK = Squeeze (dots_TK1, last)
  dots = CastLike (dots_TK, rows)
}
"""

# Where a slot's row and block are, from its virtual index.
_LOCATE = """
  n = Shape <start: int = 0, end: int = 1> ({table})
  block_TK = Div (indices, n)
  row_TK = Mod (indices, n)
  looked_up = Gather <axis: int = 0> ({table}, row_TK)
  scores_TKC = Cast <to: int = {sum}> (scores)
"""

# rows_TKD, weights_TKC and block_TK become pooled_TED. Every row is multiplied by the weights of all cores, one product
# for a token, and of the result each core keeps its own columns: as many bytes as the pooled blocks, while weighting
# the rows core by core would write and read every row again.
_POOL = """
  rest = Constant <value_ints = [-1]> ()
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  nothing_single = Constant <value_float: float = 0.0> ()
  nothing = Cast <to: int = {sum}> (nothing_single)
  e = Constant <value_int: int = @num_blocks> ()
  blocks_E = Range (zero, e, one)
  blocks_E1 = Unsqueeze (blocks_E, rest)
  block_axes = Constant <value_ints = [1, 2]> ()
  block_T11K = Unsqueeze (block_TK, block_axes)
  member_T1EK = Equal (block_T11K, blocks_E1)
  weights_TCK = Transpose <perm: ints = [0, 2, 1]> (weights_TKC)
  weight_axis = Constant <value_ints = [2]> ()
  weights_TC1K = Unsqueeze (weights_TCK, weight_axis)
  weights_TCEK = Where (member_T1EK, weights_TC1K, nothing)
  c = Shape <start: int = 2> (scores)
  k = Shape <start: int = 1> (indices)
  e_axis = Reshape (e, rest)
  groups = Mul (c, e_axis)
  keep = Constant <value_ints = [0]> ()
  by_group = Concat <axis: int = 0> (keep, groups, k)
  weights_TGK = Reshape (weights_TCEK, by_group)
  pooled_TGD = MatMul (weights_TGK, rows_TKD)
  by_cores = Concat <axis: int = 0> (keep, c, e_axis, c, rest)
  pooled_TCECX = Reshape (pooled_TGD, by_cores)
  cores = Squeeze (c)
  core_C = Range (zero, cores, one)
  core_axes = Constant <value_ints = [1, 2, 3]> ()
  core_C111 = Unsqueeze (core_C, core_axes)
  core_C1 = Unsqueeze (core_C, rest)
  own = Equal (core_C111, core_C1)
  own_TCECX = Where (own, pooled_TCECX, nothing)
  middle = Constant <value_ints = [1]> ()
  pooled_TECX = ReduceSum <keepdims: int = 0> (own_TCECX, middle)
  whole = Constant <value_ints = [0, 0, -1]> ()
  pooled_TED = Reshape (pooled_TECX, whole)
"""

_LOOKUP_REDUCE = (
    "LookupReduce <num_blocks> (values, indices, scores) => (pooled)\n{"
    + _LOCATE.replace("{table}", "values")
    + """
  rows_TKD = Cast <to: int = {sum}> (looked_up)
  weights_TKC = Identity (scores_TKC)
"""
    + _POOL
    + "  pooled = CastLike (pooled_TED, values)\n}\n"
)

_INT8_ROWS = "  rows_TKD = Cast <to: int = {sum}> (looked_up)\n"

# Two columns a byte, the even one in the low half: with both sign bits turned, a half is its number plus 8.
_INT4_ROWS = """
  sign_bits = Constant <value = uint8 {136}> ()
  low_bits = Constant <value = uint8 {15}> ()
  half = Constant <value = uint8 {4}> ()
  turned_TKB = BitwiseXor (looked_up, sign_bits)
  low_TKB = BitwiseAnd (turned_TKB, low_bits)
  high_TKB = BitShift <direction: string = "RIGHT"> (turned_TKB, half)
  pair = Constant <value_ints = [-1]> ()
  low_TKB1 = Unsqueeze (low_TKB, pair)
  high_TKB1 = Unsqueeze (high_TKB, pair)
  halves_TKB2 = Concat <axis: int = -1> (low_TKB1, high_TKB1)
  columns = Constant <value_ints = [0, 0, -1]> ()
  halves_TKD = Reshape (halves_TKB2, columns)
  above_TKD = Cast <to: int = {sum}> (halves_TKD)
  eight_single = Constant <value_float: float = 8.0> ()
  eight = Cast <to: int = {sum}> (eight_single)
  rows_TKD = Sub (above_TKD, eight)
"""

_SCALED_WEIGHTS = """
  scales_TK = Gather <axis: int = 0> (scales, row_TK)
  wide_scales_TK = Cast <to: int = {sum}> (scales_TK)
  scale_axis = Constant <value_ints = [2]> ()
  scales_TK1 = Unsqueeze (wide_scales_TK, scale_axis)
  weights_TKC = Mul (scores_TKC, scales_TK1)
"""


def _quantized(rows: str) -> str:
    return (
        "LookupReduceQuantized <num_blocks> (rows, scales, indices, scores) => (pooled)\n{"
        + _LOCATE.replace("{table}", "rows")
        + rows
        + _SCALED_WEIGHTS
        + _POOL
        + "  pooled = CastLike (pooled_TED, scores)\n}\n"
    )


_LOOKUP_REDUCE_QUANTIZED = {8: _quantized(_INT8_ROWS), 4: _quantized(_INT4_ROWS)}


def lookup_bodies(bits: int, sum_type: int) -> dict[str, str]:
    """The text of each lookup's body by op type; `bits` of a quantised number."""
    texts = {
        "LookupDot": _LOOKUP_DOT,
        "LookupReduce": _LOOKUP_REDUCE,
        "LookupReduceQuantized": _LOOKUP_REDUCE_QUANTIZED[bits],
    }
    return {name: text.replace("{sum}", str(sum_type)) for name, text in texts.items()}
