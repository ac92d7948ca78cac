"""A mixture of experts in the place of an MLP: every token goes to its best experts, none is dropped.

Shapes: B batch, S sequence, T = B*S tokens, D hidden size, I width of an expert, E experts, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor, nn

from ultramem import ops
from ultramem.config import MoEConfig
from ultramem.ops.exchange import Way, exchange


class MoEOutput(NamedTuple):
    """`hidden_BSD`, and the balance loss with its weight, a float32 scalar."""

    hidden_BSD: Tensor
    balance_loss: Tensor


class MoE(nn.Module):
    """Top-K of E non-gated GELU experts, weighted by the softmax over the logits of the chosen (Mixtral, section 2).

    Tokens are sorted by expert and the experts run as grouped matrix products, so that the work does not depend on how
    they are spread.

    Attributes:
        batch_ranks: the ranks that each have a part of the batch, whose choices are balanced together; None: this one.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.config = config
        self.batch_ranks: Way | None = None
        self.router = nn.Linear(hidden_size, config.num_experts, bias=False)
        self.up_EDI = nn.Parameter(torch.empty(config.num_experts, hidden_size, inner_size))
        self.down_EID = nn.Parameter(torch.empty(config.num_experts, inner_size, hidden_size))

    def reset_parameters(self, *, residual_layers: int) -> None:
        """Router and experts as the linears of a dense MLP."""
        nn.init.normal_(self.router.weight, std=self.router.in_features**-0.5)
        nn.init.normal_(self.up_EDI, std=self.up_EDI.shape[1] ** -0.5)
        nn.init.normal_(self.down_EID, std=(self.down_EID.shape[1] * 2 * residual_layers) ** -0.5)

    def forward(self, hidden_BSD: Tensor) -> MoEOutput:
        hidden_TD = hidden_BSD.flatten(0, 1)
        logits_TE = self.router(hidden_TD)
        logits_TE = logits_TE.to(ops.accumulation_dtype(logits_TE.dtype))
        best_TK = logits_TE.topk(self.config.experts_per_token, dim=1)
        gate_TK = best_TK.values.softmax(dim=1)
        expert_TK = best_TK.indices
        member_EN = expert_TK.flatten() == torch.arange(self.config.num_experts, device=expert_TK.device).unsqueeze(1)
        sizes_E = member_EN.sum(dim=1)
        output_TD = self._experts(hidden_TD, expert_TK, gate_TK, sizes_E)
        return MoEOutput(output_TD.view(hidden_BSD.shape), self._balance_loss(logits_TE, sizes_E))

    def _experts(self, hidden_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, sizes_E: Tensor) -> Tensor:
        t, k = expert_TK.shape
        order = expert_TK.flatten().argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(t * k, device=order.device))
        dtype = torch.get_autocast_dtype(hidden_TD.device.type) if _autocasts(hidden_TD) else self.up_EDI.dtype
        output_ND = self._run(hidden_TD.to(dtype)[order // k], sizes_E)
        output_TKD = output_ND[place].view(t, k, -1)
        return (output_TKD * gate_TK.to(dtype).unsqueeze(-1)).sum(dim=1)

    def _run(self, sorted_ND: Tensor, sizes_E: Tensor) -> Tensor:
        """What the experts make of their inputs, which lie one expert's after the other's."""
        dtype, ends_E = sorted_ND.dtype, sizes_E.cumsum(0).to(torch.int32)
        inner_NI = F.gelu(ops.grouped_mm(sorted_ND, self.up_EDI.to(dtype), ends_E))
        return ops.grouped_mm(inner_NI, self.down_EID.to(dtype), ends_E)

    def _balance_loss(self, logits_TE: Tensor, sizes_E: Tensor) -> Tensor:
        """`weight * E * sum_e f_e P_e` with f the share of choices and P the mean probability (Switch, eq 4-6).

        With `batch_ranks`, f is that of all ranks' tokens and P of this rank's, so that the mean over ranks is right.
        """
        tokens = logits_TE.shape[0]
        if self.batch_ranks is not None:
            sizes_E = exchange(sizes_E, self.batch_ranks)
            tokens = tokens * self.batch_ranks.size
        share_E = sizes_E / max(1, tokens * self.config.experts_per_token)
        probability_E = logits_TE.softmax(dim=1).mean(dim=0)
        return self.config.balance_loss_weight * self.config.num_experts * (share_E * probability_E).sum()


def _autocasts(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


__all__ = ["MoE", "MoEOutput"]
