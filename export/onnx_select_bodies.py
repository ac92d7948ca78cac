"""Bodies of the selections' ONNX nodes, in standard operators: the text of `onnx.parser`.

`{sum}` is the number of the type in which scores are added up and compared (TensorProto.FLOAT or DOUBLE), as in the
ops. TopK prefers the lower index among equals, which is the ops' own rule. GatherElements takes its axis counted from
the front: onnx's reference evaluator gets a negative one wrong.
"""

from __future__ import annotations

from ultramem.ops.tucker_topk import TAIL_SHARE, Candidates

_PRODUCT_TOPK = """
ProductTopK <k> (row_scores, col_scores) => (scores, addresses)
{
  row_wide = Cast <to: int = {sum}> (row_scores)
  col_wide = Cast <to: int = {sum}> (col_scores)
  last = Constant <value_ints = [-1]> ()
  second_last = Constant <value_ints = [-2]> ()
  k_scalar = Constant <value_int: int = @k> ()
  k = Reshape (k_scalar, last)
  n = Shape <start: int = 2> (row_scores)
  row_best, row_any = TopK <axis: int = -1> (row_wide, k)
  row_THK, row_from = TopK <axis: int = -1, largest: int = 0> (row_any, k)
  col_best, col_any = TopK <axis: int = -1> (col_wide, k)
  col_THK, col_from = TopK <axis: int = -1, largest: int = 0> (col_any, k)
  row_score_THK = GatherElements <axis: int = 2> (row_wide, row_THK)
  col_score_THK = GatherElements <axis: int = 2> (col_wide, col_THK)
  row_score_THK1 = Unsqueeze (row_score_THK, last)
  col_score_TH1K = Unsqueeze (col_score_THK, second_last)
  cell_THKK = Add (row_score_THK1, col_score_TH1K)
  row_start_THK = Mul (row_THK, n)
  row_start_THK1 = Unsqueeze (row_start_THK, last)
  col_TH1K = Unsqueeze (col_THK, second_last)
  address_THKK = Add (row_start_THK1, col_TH1K)
  flat = Constant <value_ints = [0, 0, -1]> ()
  cell_THG = Reshape (cell_THKK, flat)
  address_THG = Reshape (address_THKK, flat)
  kept, position_THK = TopK <axis: int = -1> (cell_THG, k)
  scores = CastLike (kept, row_scores)
  addresses = GatherElements <axis: int = 2> (address_THG, position_THK)
}
"""

_TUCKER_START = """
TuckerTopK <k> (row_scores, col_scores, cores, u, t) => (scores, addresses)
{
  last = Constant <value_ints = [-1]> ()
  second_last = Constant <value_ints = [-2]> ()
  flat = Constant <value_ints = [0, 0, -1]> ()
  k_scalar = Constant <value_int: int = @k> ()
  k = Reshape (k_scalar, last)
  n = Shape <start: int = 3> (row_scores)
  thr = Shape <start: int = 0, end: int = 3> (row_scores)
  row_wide = Cast <to: int = {sum}> (row_scores)
  col_wide = Cast <to: int = {sum}> (col_scores)
  u_H1R = Unsqueeze (u, second_last)
  t_H1R = Unsqueeze (t, second_last)
  a_TH1N = MatMul (u_H1R, row_wide)
  b_TH1N = MatMul (t_H1R, col_wide)
  a_THN = Squeeze (a_TH1N, second_last)
  b_THN = Squeeze (b_TH1N, second_last)
  core_axis = Constant <value_ints = [1]> ()
  core_HRR = ReduceSum <keepdims: int = 0> (cores, core_axis)
  core_transposed_HRR = Transpose <perm: ints = [0, 2, 1]> (core_HRR)
"""

# Cells, ascending by address, where the `{s}` rows and columns with the {largest} a and b cross.
_TUCKER_GRID = """
  row_best_{tail}, row_any_{tail} = TopK <axis: int = -1, largest: int = {largest}> ({a}, {s})
  row_{tail}_THS, row_from_{tail} = TopK <axis: int = -1, largest: int = 0> (row_any_{tail}, {s})
  col_best_{tail}, col_any_{tail} = TopK <axis: int = -1, largest: int = {largest}> ({b}, {s})
  col_{tail}_THS, col_from_{tail} = TopK <axis: int = -1, largest: int = 0> (col_any_{tail}, {s})
  thrs_{tail} = Concat <axis: int = 0> (thr, {s})
  row_{tail}_TH1S = Unsqueeze (row_{tail}_THS, second_last)
  col_{tail}_TH1S = Unsqueeze (col_{tail}_THS, second_last)
  row_{tail}_THRS = Expand (row_{tail}_TH1S, thrs_{tail})
  col_{tail}_THRS = Expand (col_{tail}_TH1S, thrs_{tail})
  row_score_{tail} = GatherElements <axis: int = 3> (row_wide, row_{tail}_THRS)
  col_score_{tail} = GatherElements <axis: int = 3> (col_wide, col_{tail}_THRS)
  left_{tail}_THRS = MatMul (core_transposed_HRR, row_score_{tail})
  left_{tail}_THSR = Transpose <perm: ints = [0, 1, 3, 2]> (left_{tail}_THRS)
  cell_{tail}_THSS = MatMul (left_{tail}_THSR, col_score_{tail})
  cell_{tail} = Reshape (cell_{tail}_THSS, flat)
  row_start_{tail} = Mul (row_{tail}_THS, n)
  row_{tail}_THS1 = Unsqueeze (row_start_{tail}, last)
  address_{tail}_THSS = Add (row_{tail}_THS1, col_{tail}_TH1S)
  address_{tail} = Reshape (address_{tail}_THSS, flat)
"""

# With few rows the two ends overlap: a cell of both grids counts once. Then all cells ascending by address.
_TUCKER_MERGE = """
  row_low_again = Unsqueeze (row_low_THS, last)
  row_same = Equal (row_low_again, row_high_TH1S)
  row_same_number = Cast <to: int = 7> (row_same)
  row_twice = ReduceMax <keepdims: int = 1> (row_same_number, last)
  col_low_again = Unsqueeze (col_low_THS, last)
  col_same = Equal (col_low_again, col_high_TH1S)
  col_same_number = Cast <to: int = 7> (col_same)
  col_twice_THS = ReduceMax <keepdims: int = 0> (col_same_number, last)
  col_twice = Unsqueeze (col_twice_THS, second_last)
  twice_THSS = Mul (row_twice, col_twice)
  twice_number = Reshape (twice_THSS, flat)
  twice = Cast <to: int = 9> (twice_number)
  infinite = Constant <value_float: float = -inf> ()
  least = CastLike (infinite, cell_low)
  cell_low_once = Where (twice, least, cell_low)
  cell_any = Concat <axis: int = -1> (cell_high, cell_low_once)
  address_any = Concat <axis: int = -1> (address_high, address_low)
  cells = Shape <start: int = 2> (address_any)
  address_THG, order = TopK <axis: int = -1, largest: int = 0> (address_any, cells)
  cell_THG = GatherElements <axis: int = 2> (cell_any, order)
"""

_TUCKER_END = """
  kept, position_THK = TopK <axis: int = -1> (cell_THG, k)
  addresses = GatherElements <axis: int = 2> (address_THG, position_THK)
  row_THK = Div (addresses, n)
  col_THK = Mod (addresses, n)
  row_TH1K = Unsqueeze (row_THK, second_last)
  col_TH1K = Unsqueeze (col_THK, second_last)
  thrk = Concat <axis: int = 0> (thr, k)
  row_THRK = Expand (row_TH1K, thrk)
  col_THRK = Expand (col_TH1K, thrk)
  row_score_THRK = GatherElements <axis: int = 3> (row_wide, row_THRK)
  col_score_THRK = GatherElements <axis: int = 3> (col_wide, col_THRK)
  third_last = Constant <value_ints = [-3]> ()
  row_score_TH1RK = Unsqueeze (row_score_THRK, third_last)
  col_score_TH1RK = Unsqueeze (col_score_THRK, third_last)
  cores_transposed = Transpose <perm: ints = [0, 1, 3, 2]> (cores)
  left_THCRK = MatMul (cores_transposed, row_score_TH1RK)
  product_THCRK = Mul (left_THCRK, col_score_TH1RK)
  scores_THCK = ReduceSum <keepdims: int = 0> (product_THCRK, second_last)
  scores_THKC = Transpose <perm: ints = [0, 1, 3, 2]> (scores_THCK)
  scores = CastLike (scores_THKC, row_scores)
}
"""

_TAIL = f"""
  share = Constant <value = double {{{TAIL_SHARE}}}> ()
  k_double = Cast <to: int = 11> (k)
  share_of_k = Mul (share, k_double)
  tail_double = Ceil (share_of_k)
  s = Cast <to: int = 7> (tail_double)
"""


def _tucker_topk_text(candidates: Candidates) -> str:
    if candidates == "one_tailed":
        grid = _TUCKER_GRID.format(tail="high", largest=1, a="a_THN", b="b_THN", s="k")
        named = "  address_THG = Identity (address_high)\n  cell_THG = Identity (cell_high)\n"
        return _TUCKER_START + grid + named + _TUCKER_END
    high = _TUCKER_GRID.format(tail="high", largest=1, a="a_THN", b="b_THN", s="s")
    low = _TUCKER_GRID.format(tail="low", largest=0, a="a_THN", b="b_THN", s="s")
    return _TUCKER_START + _TAIL + high + low + _TUCKER_MERGE + _TUCKER_END


def select_bodies(candidates: Candidates, sum_type: int) -> dict[str, str]:
    """The text of each selection's body by op type."""
    texts = {"ProductTopK": _PRODUCT_TOPK, "TuckerTopK": _tucker_topk_text(candidates)}
    return {name: text.replace("{sum}", str(sum_type)) for name, text in texts.items()}
