"""The ops of this package as ONNX: nodes of domain `ultramem`, version 1, each with a body of standard operators.

A runtime with its own kernel for such a node (an ONNX Runtime custom op, a TensorRT plugin) runs that; any other runs
the body. In the bodies, as in the ops: T tokens, H heads, R ranks, N the side of the grid, K slots, C cores, E blocks,
D value dim, S rows (or columns) of a tail. TopK prefers the lower index among equals, which is the ops' own rule.
GatherElements takes its axis counted from the front: onnx's reference evaluator gets a negative one wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ultramem.ops.permute_addresses import PASSES, ROUNDS, schedule
from ultramem.ops.tucker_topk import CANDIDATES, TAIL_SHARE, Candidates

DOMAIN = "ultramem"
VERSION = 1
OPSET = 20

_LOOKUP_DOT = """
LookupDot (rows, indices, query) => (dots)
{
  n = Shape <start: int = 0, end: int = 1> (rows)
  row_TK = Mod (indices, n)
  rows_TKD = Gather <axis: int = 0> (rows, row_TK)
  last = Constant <value_ints = [-1]> ()
  query_TD1 = Unsqueeze (query, last)
  dots_TK1 = MatMul (rows_TKD, query_TD1)
  dots = Squeeze (dots_TK1, last)
}
"""

_LOOKUP_REDUCE = """
LookupReduce <num_blocks> (values, indices, scores) => (pooled)
{
  n = Shape <start: int = 0, end: int = 1> (values)
  block_TK = Div (indices, n)
  row_TK = Mod (indices, n)
  rows_TKD = Gather <axis: int = 0> (values, row_TK)
  c = Shape <start: int = 2> (scores)
  keep_two = Constant <value_ints = [0, 0]> ()
  rest = Constant <value_ints = [-1]> ()
  by_core = Concat <axis: int = 0> (keep_two, c, rest)
  rows_TKCX = Reshape (rows_TKD, by_core)
  like_values_TKC = CastLike (scores, values)
  scores_TKC1 = Unsqueeze (like_values_TKC, rest)
  weighted_TKCX = Mul (rows_TKCX, scores_TKC1)
  whole_rows = Concat <axis: int = 0> (keep_two, rest)
  weighted_TKD = Reshape (weighted_TKCX, whole_rows)
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  e = Constant <value_int: int = @num_blocks> ()
  blocks_E = Range (zero, e, one)
  blocks_E1 = Unsqueeze (blocks_E, rest)
  middle = Constant <value_ints = [1]> ()
  block_T1K = Unsqueeze (block_TK, middle)
  member_TEK = Equal (block_T1K, blocks_E1)
  weight_TEK = CastLike (member_TEK, values)
  pooled = MatMul (weight_TEK, weighted_TKD)
}
"""

_PRODUCT_TOPK = """
ProductTopK <k> (row_scores, col_scores) => (scores, addresses)
{
  last = Constant <value_ints = [-1]> ()
  second_last = Constant <value_ints = [-2]> ()
  k_scalar = Constant <value_int: int = @k> ()
  k = Reshape (k_scalar, last)
  n = Shape <start: int = 2> (row_scores)
  row_best, row_any = TopK <axis: int = -1> (row_scores, k)
  row_THK, row_from = TopK <axis: int = -1, largest: int = 0> (row_any, k)
  col_best, col_any = TopK <axis: int = -1> (col_scores, k)
  col_THK, col_from = TopK <axis: int = -1, largest: int = 0> (col_any, k)
  row_score_THK = GatherElements <axis: int = 2> (row_scores, row_THK)
  col_score_THK = GatherElements <axis: int = 2> (col_scores, col_THK)
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
  scores, position_THK = TopK <axis: int = -1> (cell_THG, k)
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
  u_H1R = Unsqueeze (u, second_last)
  t_H1R = Unsqueeze (t, second_last)
  a_TH1N = MatMul (u_H1R, row_scores)
  b_TH1N = MatMul (t_H1R, col_scores)
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
  row_score_{tail} = GatherElements <axis: int = 3> (row_scores, row_{tail}_THRS)
  col_score_{tail} = GatherElements <axis: int = 3> (col_scores, col_{tail}_THRS)
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
  row_score_THRK = GatherElements <axis: int = 3> (row_scores, row_THRK)
  col_score_THRK = GatherElements <axis: int = 3> (col_scores, col_THRK)
  third_last = Constant <value_ints = [-3]> ()
  row_score_TH1RK = Unsqueeze (row_score_THRK, third_last)
  col_score_TH1RK = Unsqueeze (col_score_THRK, third_last)
  cores_transposed = Transpose <perm: ints = [0, 1, 3, 2]> (cores)
  left_THCRK = MatMul (cores_transposed, row_score_TH1RK)
  product_THCRK = Mul (left_THCRK, col_score_TH1RK)
  scores_THCK = ReduceSum <keepdims: int = 0> (product_THCRK, second_last)
  scores = Transpose <perm: ints = [0, 1, 3, 2]> (scores_THCK)
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


def _permute_addresses_text() -> str:
    """The Feistel rounds of `ultramem.ops.permute_addresses`, written out."""
    keys = [f"key_{index}" for index in range(4 * PASSES * ROUNDS)]
    lines = [
        "PermuteAddresses <size, sides, keys> (addresses) => (permuted)",
        "{",
        "  sides = Constant <value_ints: ints = @sides> ()",
        "  a, b = Split <axis: int = 0, num_outputs: int = 2> (sides)",
        "  keys = Constant <value_ints: ints = @keys> ()",
        f"  {', '.join(keys)} = Split <axis: int = 0, num_outputs: int = {len(keys)}> (keys)",
        "  size = Constant <value_int: int = @size> ()",
        "  two = Constant <value_int: int = 2> ()",
        "  half = Div (size, two)",
        "  covered = Mul (a, b)",
        f"  bits_16 = Constant <value_int: int = {2**16}> ()",
        f"  bits_31 = Constant <value_int: int = {2**31}> ()",
    ]
    before = "addresses"
    for number in range(PASSES):
        if number:
            lines += [f"  moved_{number} = Add ({before}, half)", f"  turned_{number} = Mod (moved_{number}, size)"]
            before = f"turned_{number}"
        high, low = f"high_{number}", f"low_{number}"
        lines += [f"  {high} = Div ({before}, b)", f"  {low} = Mod ({before}, b)"]
        for index in range(ROUNDS):
            name, key = f"{number}_{index}", keys[4 * (number * ROUNDS + index) :]
            source, target, side = (low, high, "a") if index % 2 == 0 else (high, low, "b")
            lines += [
                f"  scaled_{name} = Mul ({source}, {key[0]})",
                f"  added_{name} = Add (scaled_{name}, {key[1]})",
                f"  mixed_{name} = Mod (added_{name}, bits_31)",
                f"  square_{name} = Mul (mixed_{name}, mixed_{name})",
                f"  cut_{name} = Div (square_{name}, bits_16)",
                f"  middle_{name} = Mod (cut_{name}, bits_31)",
                f"  again_{name} = Mul (middle_{name}, {key[2]})",
                f"  summed_{name} = Add (again_{name}, {key[3]})",
                f"  shifted_{name} = Div (summed_{name}, bits_16)",
                f"  word_{name} = Mod (shifted_{name}, bits_31)",
                f"  wide_{name} = Mul (word_{name}, {side})",
                f"  hash_{name} = Div (wide_{name}, bits_31)",
                f"  sum_{name} = Add ({target}, hash_{name})",
                f"  new_{name} = Mod (sum_{name}, {side})",
            ]
            if index % 2 == 0:
                high = f"new_{name}"
            else:
                low = f"new_{name}"
        after = "permuted" if number == PASSES - 1 else f"after_{number}"
        lines += [
            f"  start_{number} = Mul ({high}, b)",
            f"  joined_{number} = Add (start_{number}, {low})",
            f"  inside_{number} = Less ({before}, covered)",
            f"  {after} = Where (inside_{number}, joined_{number}, {before})",
        ]
        before = after
    return "\n".join([*lines, "}"])


def function_protos(candidates: Candidates = "one_tailed", *, opset: int = OPSET) -> dict[str, Any]:
    """The body of each op as a FunctionProto, by op type.

    The body of TuckerTopK is that of one selection rule: a file holds nodes of one rule, and their attribute
    `candidates` tells it to kernels.
    """
    import onnx.parser

    assert candidates in CANDIDATES, candidates
    texts = {
        "LookupDot": _LOOKUP_DOT,
        "LookupReduce": _LOOKUP_REDUCE,
        "PermuteAddresses": _permute_addresses_text(),
        "ProductTopK": _PRODUCT_TOPK,
        "TuckerTopK": _tucker_topk_text(candidates),
    }
    found = {}
    for name, text in texts.items():
        function = onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{text}')
        for node in function.node:
            node.name = node.output[0]
        function.doc_string = f"candidates = {candidates}" if name == "TuckerTopK" else ""
        found[name] = function
    return found


@contextlib.contextmanager
def schemas() -> Iterator[None]:
    """Signatures of the nodes, known to onnx inside the block."""
    from onnx import defs

    made = [_schema(defs, *signature) for signature in _SIGNATURES]
    for schema in made:
        defs.register_schema(schema)
    try:
        yield
    finally:
        for schema in made:
            defs.deregister_schema(schema.name, VERSION, DOMAIN)


_INT64 = "tensor(int64)"
_SIGNATURES: tuple[tuple[str, dict[str, str], dict[str, str], dict[str, str]], ...] = (
    ("LookupDot", {"rows": "T", "indices": _INT64, "query": "T"}, {"dots": "T"}, {}),
    ("LookupReduce", {"values": "T", "indices": _INT64, "scores": "T"}, {"pooled": "T"}, {"num_blocks": "INT"}),
    (
        "PermuteAddresses",
        {"addresses": _INT64},
        {"permuted": _INT64},
        {"size": "INT", "seed": "INT", "sides": "INTS", "keys": "INTS"},
    ),
    ("ProductTopK", {"row_scores": "T", "col_scores": "T"}, {"scores": "T", "addresses": _INT64}, {"k": "INT"}),
    (
        "TuckerTopK",
        {"row_scores": "T", "col_scores": "T", "cores": "T", "u": "T", "t": "T"},
        {"scores": "T", "addresses": _INT64},
        {"k": "INT", "candidates": "STRING"},
    ),
)


def _schema(defs: Any, name: str, inputs: dict[str, str], outputs: dict[str, str], attributes: dict[str, str]) -> Any:
    schema = defs.OpSchema
    floats = ["tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)"]
    return schema(
        name,
        DOMAIN,
        VERSION,
        inputs=[schema.FormalParameter(each, kind) for each, kind in inputs.items()],
        outputs=[schema.FormalParameter(each, kind) for each, kind in outputs.items()],
        type_constraints=[("T", floats, "")] if "T" in inputs.values() else [],
        attributes=[
            schema.Attribute(each, getattr(schema.AttrType, kind), "", required=True)
            for each, kind in attributes.items()
        ],
    )


def translations() -> dict[Any, Callable[..., Any]]:
    """For torch.onnx: which node each op becomes. Call inside `schemas()`."""
    from onnxscript.values import Opset

    nodes = Opset(DOMAIN, VERSION)

    def lookup_dot(rows: Any, indices: Any, query: Any, sparse_grad: bool) -> Any:
        return nodes.LookupDot(rows, indices, query)

    def permute_addresses(addresses: Any, size: int, seed: int, inverse: bool) -> Any:
        if inverse:
            raise ValueError("an inverse address permutation has no ONNX node")
        return nodes.PermuteAddresses(addresses, seed=seed, **permutation_attributes(size, seed))

    def lookup_reduce(
        values: Any,
        indices: Any,
        scores: Any,
        num_blocks: int,
        sparse_grad: bool,
        permutation_seed: int | None = None,
    ) -> Any:
        if permutation_seed is not None:
            indices = permute_addresses(indices, values.shape[0] * num_blocks, permutation_seed, inverse=False)
        return nodes.LookupReduce(values, indices, scores, num_blocks=num_blocks)

    def product_topk(row_scores: Any, col_scores: Any, k: int) -> Any:
        return nodes.ProductTopK(row_scores, col_scores, k=k)

    def tucker_topk(row_scores: Any, col_scores: Any, cores: Any, u: Any, t: Any, k: int, candidates: str) -> Any:
        return nodes.TuckerTopK(row_scores, col_scores, cores, u, t, k=k, candidates=candidates)

    ops = torch.ops.ultramem
    return {
        ops.lookup_dot.default: lookup_dot,
        ops.lookup_reduce.default: lookup_reduce,
        ops.permute_addresses.default: permute_addresses,
        ops.product_topk.default: product_topk,
        ops.tucker_topk.default: tucker_topk,
    }


def permutation_attributes(size: int, seed: int) -> dict[str, Any]:
    """Attributes of a PermuteAddresses node that its body computes from."""
    plan = schedule(size, seed)
    return {"size": size, "sides": [plan.a, plan.b], "keys": [word for key in plan.keys for word in key]}
