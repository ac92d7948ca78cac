"""A model for inference, in which nothing is computed that depends on weights alone.

Shapes: T tokens, H heads, R ranks, N side of the logical grid, K key width of one rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ultramem.graph.coarse_keys import are_quicker_coarse, fold_coarse_keys, has_coarse_keys
from ultramem.graph.fold_values import fold_values, has_foldable_values
from ultramem.graph.memory_layer import Score, Select, UltraMemLayer
from ultramem.graph.shared_copy import Model, shared_copy
from ultramem.graph.value_table import ValueTable


class FoldedScore(nn.Module):
    """`Score` whose keys were normalised once, laid out so that rows and columns are one batched product."""

    keys: Tensor

    def __init__(self, score: Score) -> None:
        super().__init__()
        query, keys = score.equation.split("->")[0].split(",")
        # What both sides have is the batch of a product: first in the keys, which then are read as they lie.
        batch = "s" + "".join(axis for axis in keys if axis in query and axis != "k")
        rest = "".join(axis for axis in keys if axis not in batch)
        source = keys.replace("h", "hs", 1)
        self.register_buffer(
            "keys", torch.einsum(f"{source}->{batch}{rest}", score.norm(score.keys_H2RNK).detach()).contiguous()
        )
        self.equation = f"{query.replace('t', 'ts', 1)},{batch}{rest}->sthrn"

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column scores [T,H,R,N] of a query [T,2,(H),(R),K]."""
        row_scores_THRN, col_scores_THRN = torch.einsum(self.equation, query, self.keys).unbind(0)
        return row_scores_THRN, col_scores_THRN


def fold_for_inference(model: Model, *, coarse_keys: bool | None = False, values: bool = False) -> Model:
    """A model that computes what `model` does, with normalised keys and the cores' singular vectors as constants.

    Args:
        model: a `Transformer` or an `UltraMemLayer` in eval mode; stays as it is. All else is shared with it.
        coarse_keys: where it can be (see `ultramem.graph.coarse_keys`), candidates are chosen by keys that are summed
            over the ranks, and only theirs are scored rank by rank: about half the bytes of the keys for a token, half
            as many bytes again in memory, and a few small operators more. None: in layers for which that is quicker.
        values: where the table does not grow by it (see `ultramem.graph.fold_values`), rows are projected to the
            model's width once. This takes a table of its own.

    Returns:
        The model for inference. Training `model` on does not change its keys and singular vectors, and its state dict
        is not that of `model`.

    Raises:
        ValueError: the model is in training mode, or its tables are stale.
    """
    if model.training:
        raise ValueError("the model must be in eval mode to be folded (call model.eval())")
    with torch.no_grad():
        folded = shared_copy(model, modules=lambda each: FoldedScore(each).eval() if isinstance(each, Score) else None)
        for module in folded.modules():
            if isinstance(module, Select):
                module.fold_singular_pair()
        for layer in [module for module in folded.modules() if isinstance(module, UltraMemLayer)]:
            if coarse_keys is not False and has_coarse_keys(layer.config):
                # Where ranks share a query, folded keys lie as [2,H,R,N,K].
                keys_2HRNK = layer.get_buffer("score.keys")
                if coarse_keys or are_quicker_coarse(keys_2HRNK):
                    fold_coarse_keys(layer, layer.config, keys_2HRNK)
            if values and has_foldable_values(layer.config) and type(layer.table) is ValueTable:
                fold_values(layer, layer.config)
    return folded
