"""A mixture of experts of which every rank holds some: tokens travel to their experts and back.

Shapes: N tokens times their experts, D hidden size, I width of an expert, E experts, L experts of a rank, P ranks,
R inputs that all ranks send to this one's experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ultramem.config import MoEConfig
from ultramem.graph.moe import MoE
from ultramem.graph.sharded_module import draw_part_, keep_state_whole
from ultramem.graph.table_shard import TableShard
from ultramem.ops.exchange import ALL_TO_ALL, Way, exchange


class ShardedMoE(MoE):
    """What `MoE` does, with E/P experts on each of the P ranks of a shard by rows.

    All ranks must call it the same number of times. Gradients of experts are those of all ranks' tokens.

    Raises:
        ValueError: the ranks do not divide the experts.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, inner_size: int, shard: TableShard) -> None:
        ranks, experts = shard.ranks, config.num_experts
        if experts % ranks:
            raise ValueError(f"num_experts must be a multiple of the {ranks} ranks of expert_parallel, got {experts}")
        with torch.device("meta"):
            super().__init__(config, hidden_size, inner_size)
        self.router = nn.Linear(hidden_size, config.num_experts, bias=False)
        self.shard = shard
        self.up_EDI = nn.Parameter(torch.empty(experts // ranks, hidden_size, inner_size))
        self.down_EID = nn.Parameter(torch.empty(experts // ranks, inner_size, hidden_size))
        keep_state_whole(self)

    @property
    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all experts together, by parameter."""
        e = self.config.num_experts
        return {"up_EDI": (e, *self.up_EDI.shape[1:]), "down_EID": (e, *self.down_EID.shape[1:])}

    def reset_parameters(self, *, residual_layers: int) -> None:
        """As `MoE`: together the ranks have the numbers that one would have."""
        nn.init.normal_(self.router.weight, std=self.router.in_features**-0.5)
        hidden, inner = self.up_EDI.shape[1:]
        for name, fan_in in (("up_EDI", hidden), ("down_EID", inner * 2 * residual_layers)):
            draw_part_(getattr(self, name), self.whole_shapes[name], self.shard, std=1 / math.sqrt(fan_in))

    def _run(self, sorted_ND: Tensor, sizes_E: Tensor) -> Tensor:
        shard = self.shard
        sizes_PL = sizes_E.view(shard.ranks, -1)
        received_PL = exchange(sizes_E, Way(ALL_TO_ALL, shard.group, shard.ranks)).view(shard.ranks, -1)
        send, receive = sizes_PL.sum(1).tolist(), received_PL.sum(1).tolist()
        if torch.compiler.is_compiling():
            for count in send + receive:
                torch._check(count >= 0)
            torch._check(sum(send) == sorted_ND.shape[0])
        there = Way(ALL_TO_ALL, shard.group, shard.ranks, receive, send)
        came_RD = exchange(sorted_ND, there)
        # They came rank by rank, and within a rank expert by expert.
        expert_PL = torch.arange(received_PL.shape[1], device=sizes_E.device).expand_as(received_PL)
        expert_R = expert_PL.flatten().repeat_interleave(received_PL.flatten(), output_size=came_RD.shape[0])
        order_R = expert_R.argsort(stable=True)
        place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        output_RD = super()._run(came_RD[order_R], received_PL.sum(0))
        return exchange(output_RD[place_R], there.back())
