"""What is timed computes what it should: results against float64, with the error of plain float32 as the measure.

Shapes: T tokens, K slots or experts a token, N rows, V value dim, B sequences, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor, nn

from ultramem import ops
from ultramem.graph import Transformer
from ultramem.graph.gathered_table import GatheredTable, in_precision
from ultramem.graph.moe import MoE
from ultramem.graph.shared_copy import shared_copy
from ultramem.graph.value_table import ValueTable
from ultramem.runtime.profile.measure import Engine, draw_inputs

TOLERANCE_FACTOR = 4.0
DRAWS = 3


class WrongResultError(ArithmeticError):
    """A call computes something else: its time would be that of another computation."""


def is_near(found: Tensor, single: Tensor, exact: Tensor) -> bool:
    """Whether `found` is as near to `exact` as `single`, which is plain float32, within a small factor."""
    error = (found.double() - exact).abs().max().item()
    accepted = TOLERANCE_FACTOR * max((single.double() - exact).abs().max().item(), torch.finfo(torch.float32).eps)
    return error <= accepted  # a NaN is not


def require(what: str, agrees: Sequence[bool]) -> None:
    """The first draw decides; where it fails, all others must pass: two equal scores may change places, once.

    Raises:
        WrongResultError: they do not.
    """
    if not agrees[0] and not (len(agrees) > 1 and all(agrees[1:])):
        raise WrongResultError(f"{what}: differs from float64 by over {TOLERANCE_FACTOR:g} x float32's own error")


@torch.no_grad()
def require_lookup(values_NV: Tensor, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int) -> None:
    """`ops.lookup_reduce` against its oracle on the rows that are read."""
    n = values_NV.shape[0]
    read = (indices_TK % n).flatten()
    own = torch.arange(read.shape[0], device=read.device).view(indices_TK.shape)
    rows, indices = values_NV[read], indices_TK // n * read.shape[0] + own
    exact = ops.reference.lookup_reduce(rows.double(), indices, scores_TKC.double(), num_blocks=num_blocks)
    single = ops.reference.lookup_reduce(rows, indices, scores_TKC, num_blocks=num_blocks)
    found = ops.lookup_reduce(values_NV, indices_TK, scores_TKC, num_blocks=num_blocks)
    require(f"lookup in {n} rows", [is_near(found, single, exact)])


@torch.no_grad()
def require_memory_layer(
    what: str, layer: nn.Module, run: Callable[..., Tensor], inputs: Sequence[Tensor], past_BDW: Tensor
) -> None:
    """`run` (the layer folded, or compiled) against the plain layer in float64, whose table is read and not copied."""
    exact = shared_copy(
        layer,
        tensors=lambda each: each.double() if each.is_floating_point() else each,
        modules=lambda each: GatheredTable(each, torch.float64) if isinstance(each, ValueTable) else None,
    ).eval()
    require(
        what,
        [
            is_near(run(each, past_BDW), layer(each, past_BDW), exact(each.double(), past_BDW.double()))
            for each in inputs
        ],
    )


@torch.no_grad()
def require_logits(what: str, model: Transformer, engine: Engine, prompt_tokens: int) -> None:
    """An engine's decode step after a prompt against the model's own, and that in float64; tables are not copied."""
    exact = in_precision(model, torch.float64)
    device = model.embedding.weight.device
    agrees = []
    for seed in range(DRAWS):
        drawn = draw_inputs(model.config.vocab_size, batch=2, prompt_tokens=prompt_tokens, seed=seed)
        _, cache = engine.prefill(drawn.prompt_BS)
        found, _ = engine.decode(drawn.next_B1, cache)
        prompt, token = drawn.prompt_BS.to(device), drawn.next_B1.to(device)
        single, wide = (each(token, cache=each(prompt).cache).logits for each in (model, exact))
        agrees.append(is_near(found.cpu(), single.cpu(), wide.cpu()))
    require(what, agrees)


@torch.no_grad()
def require_moe(what: str, layer: MoE, hidden_BSD: Tensor) -> None:
    """The layer against a loop over tokens and their experts."""
    found_TD = layer(hidden_BSD).hidden_BSD.flatten(0, 1)
    hidden_TD = hidden_BSD.flatten(0, 1)
    best_TK = layer.router(hidden_TD).topk(layer.config.experts_per_token, dim=1)
    single, exact = (
        torch.stack(
            [
                sum(
                    (
                        gate * (F.gelu(x_D @ layer.up_EDI[expert].to(dtype)) @ layer.down_EID[expert].to(dtype))
                        for gate, expert in zip(gates, experts, strict=True)
                    ),
                    torch.zeros_like(x_D),
                )
                for x_D, gates, experts in zip(
                    hidden_TD.to(dtype), best_TK.values.to(dtype).softmax(1), best_TK.indices.tolist(), strict=True
                )
            ]
        )
        for dtype in (torch.float32, torch.float64)
    )
    require(what, [is_near(found_TD, single, exact)])
