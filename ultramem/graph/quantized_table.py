"""Tables of int8 or int4 rows for inference, and a model with such tables in place of its own.

Shapes: N rows, V value dim, P expert dim, B bytes a row (V or P; half of it for int4), T tokens, K slots a token,
C cores, E blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ultramem import ops
from ultramem.graph.shared_copy import shared_copy
from ultramem.graph.transformer import Transformer
from ultramem.graph.value_table import ValueTable


class QuantizedValueTable(nn.Module):
    """What `ValueTable` does, of rows that are small integers with a scale each (see `ultramem.ops.quantize_rows`).

    Attributes:
        rows_NB: value rows, int8, or uint8 that packs two int4.
        scales_N: float32, whatever the type of the model.
        expert_rows_NB, expert_scales_N: the same of the input rows, where each slot is a one-neuron expert; else None.
    """

    rows_NB: Tensor
    scales_N: Tensor
    expert_rows_NB: Tensor | None
    expert_scales_N: Tensor | None

    def __init__(self, table: ValueTable, bits: int) -> None:
        super().__init__()
        values, experts = ops.quantize_rows(table.values_NV, bits), None
        if table.experts_NP is not None:
            experts = ops.quantize_rows(table.experts_NP, bits)
        self.register_buffer("rows_NB", values.rows_NB)
        self.register_buffer("scales_N", values.scales_N)
        self.register_buffer("expert_rows_NB", None if experts is None else experts.rows_NB)
        self.register_buffer("expert_scales_N", None if experts is None else experts.scales_N)

    def forward(
        self, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int, *, permutation_seed: int | None = None
    ) -> Tensor:
        """Pooled rows [T,E,V] in the type of the scores."""
        return ops.lookup_reduce_quantized(
            self.rows_NB,
            self.scales_N,
            indices_TK,
            scores_TKC,
            num_blocks=num_blocks,
            permutation_seed=permutation_seed,
        )

    def expert_products(self, indices_TK: Tensor, query_TP: Tensor) -> Tensor:
        """Products [T,K] of the query with the input rows of virtual indices, in the type of the query."""
        assert self.expert_rows_NB is not None
        assert self.expert_scales_N is not None
        row_TK = indices_TK % self.expert_rows_NB.shape[0]
        numbers_TKP = _numbers(self.expert_rows_NB[row_TK])
        product_TK = (numbers_TKP @ query_TP.float().unsqueeze(-1)).squeeze(-1) * self.expert_scales_N[row_TK]
        return product_TK.to(query_TP.dtype)

    def gather(self, rows_R: Tensor) -> Tensor:
        """The value rows [R,V] that the small integers stand for, in float64."""
        return _dequantized(self.rows_NB, self.scales_N, rows_R)

    def gather_experts(self, rows_R: Tensor) -> Tensor:
        """The same of the input rows [R,P]."""
        assert self.expert_rows_NB is not None
        assert self.expert_scales_N is not None
        return _dequantized(self.expert_rows_NB, self.expert_scales_N, rows_R)


def _numbers(rows: Tensor) -> Tensor:
    """Small integers [...,P] of rows [...,B] in float32, by arithmetic that every engine has for it."""
    if rows.dtype != torch.uint8:
        return rows.float()
    packed = rows.float()
    high = (packed / 16).floor()
    halves = torch.stack([packed - 16 * high, high], -1).flatten(-2)
    return halves - 16 * (halves > 7)  # two's complement of four bits


def _dequantized(rows_NB: Tensor, scales_N: Tensor, rows_R: Tensor) -> Tensor:
    return ops.unpack_rows(rows_NB[rows_R]).double() * scales_N[rows_R].double().unsqueeze(1)


def quantize_tables(model: Transformer, bits: int) -> Transformer:
    """A model for inference with tables of int8 or int4 rows, which shares all other weights with `model`.

    Beside the quantised rows it takes memory for a few thousand rows at a time.

    Args:
        model: stays as it is; in eval mode.
        bits: 8 or 4.

    Raises:
        ValueError: the model has no tables or is in training mode; `bits` is neither 8 nor 4; rows of 4 bits do not
            pack (an odd width, or a core's share of one); the tables are stale.
    """
    memory = model.config.memory
    if memory is None:
        raise ValueError("the model must have memory layers for their tables to be quantised, got one without")
    if model.training:
        raise ValueError("the model must be in eval mode to be quantised (call model.eval())")
    if bits == 4 and (memory.value_dim // memory.num_cores % 2 or memory.expert_dim % 2):
        raise ValueError(
            f"value_dim / num_cores and expert_dim must be even for 4 bits, got {memory.value_dim} / "
            f"{memory.num_cores} and {memory.expert_dim}"
        )

    def quantized(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, ValueTable):
            return None
        return QuantizedValueTable(module, bits).eval()

    with torch.no_grad():
        return shared_copy(model, modules=quantized)
