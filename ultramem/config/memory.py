"""One memory layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ultramem.config.fields import require_fields_at_least, require_literals


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """One memory layer: UltraMem's by default, its relatives' by switches. The paper's symbols stand in brackets.

    Raises:
        ValueError: a field is out of range; the message names the field, the value and what is accepted.
    """

    hidden_size: int
    """[d] width of the residual stream."""
    num_layers: int
    """[L] transformer layers of the model, for the variance of the initial output, 1/(2L)."""
    value_dim: int
    """[Dv] width of a value row; the paper halves it, d/2."""
    key_dim: int
    """[Kdim] key width of a side."""
    knum: int
    """[Knum] side of the physical table, which has knum^2 rows."""
    num_heads: int = 2
    """[H] key sets."""
    top_m: int = 16
    """[m] slots kept per head."""
    rank: int = 2
    """[r] Tucker rank; 1 means additive product keys (PKM)."""
    num_cores: int = 2
    """[h] scores per slot (MCS), each weighting its own columns of the value row; 1 turns it off."""
    expansion: int = 4
    """[E] virtual blocks (IVE), a perfect square; 1 turns it off."""
    rank_layout: Literal["full", "split"] = "full"
    """"full": every rank has keys of key_dim (Table 6). "split": query and keys are cut into r pieces (Table 2)."""
    candidates: Literal["one_tailed", "two_tailed"] = "one_tailed"
    """Which cells Tucker selection rescores: the paper's, or both tails of each side, which finds nearly all of the
    exact top-m; DESIGN.md says why the paper's is the default."""
    permutation: Literal["computed", "stored", "none"] = "computed"
    """How virtual addresses are shuffled: a computed bijection, a stored random table (the paper's), or not at all."""
    permutation_seed: int = 0
    conv_width: int = 4
    """Width of the causal depthwise convolution before the query projection; 1 turns it off."""
    candidate_ratio: float = 1.0
    """[m'/m] Tucker selection rescores the candidates for ceil(ratio * m) slots and keeps the best m of them."""
    shared_query: bool = True
    """One query for all heads; False gives each head its own."""
    qk_norm: Literal["layer", "rms", "none"] = "layer"
    """Norm of queries and keys; the released code has RMSNorm."""
    qk_norm_eps: float = 1e-5
    """Added to the variance (or the mean square) in that norm."""
    score_function: Literal["none", "softmax"] = "none"
    """What kept scores go through before they weight rows; softmax is over the m slots of a head."""
    output: Literal["project", "gated", "none"] = "project"
    """"project": one matrix per virtual block (eq 13). "gated": Memory+'s W2(pooled * silu(W1 x)). "none": the pooled
    rows themselves, which must be as wide as the residual stream."""
    project_bias: bool = False
    """A bias per virtual block in the projection, weighted by the block's score sum (as Table 2's counts imply)."""
    table: Literal["own", "shared", "windows"] = "own"
    """"own": a table per layer. "shared": one of knum^2 rows for all layers (Memory+). "windows": one of
    table_layers * knum^2 rows, of which layer l sees those from l * knum^2 on, cyclically (UltraMemV2)."""
    table_layers: int = 1
    """Memory layers that read one table of windows."""
    window_share: float = 1.0
    """Share of the rows of a table of windows that one layer sees."""
    expert_dim: int = 0
    """[Dp] width of a slot's input row, which makes it a one-neuron expert (PEER, UltraMemV2); 0 turns it off."""
    expert_activation: Literal["gelu", "none"] = "gelu"
    """What the product of input and input row goes through before it multiplies the slot's scores."""
    expert_project: bool = False
    """The input goes through a matrix to expert_dim before the product (UltraMemV2); else expert_dim is hidden_size."""
    init: Literal["calibrated", "paper", "released", "memory_plus"] = "calibrated"
    """"calibrated": scales are measured on the layer's own keys and cores. "paper": the closed rule of Appendix A.
    "released": the authors' code, values of std 0.02. "memory_plus": uniform keys, values of std hidden_size^-0.5."""
    aux_loss_weight: float = 0.001
    """[alpha] weight of the loss on the cores' trailing singular values; 0 turns it off."""
    aux_loss_margin: float = 0.15
    """[tau] singular values below it are free."""

    def __post_init__(self) -> None:
        require_fields_at_least(
            self, 1, "hidden_size", "num_layers", "value_dim", "key_dim", "knum", "num_heads", "top_m", "rank",
            "num_cores", "expansion", "conv_width", "table_layers", "candidate_ratio",
        )  # fmt: skip
        require_fields_at_least(
            self, 0, "permutation_seed", "expert_dim", "qk_norm_eps", "aux_loss_weight", "aux_loss_margin"
        )
        require_literals(self)
        if math.isqrt(self.expansion) ** 2 != self.expansion:
            raise ValueError(f"expansion must be a perfect square (1, 4, 9, 16), got {self.expansion}")
        if self.value_dim % self.num_cores:
            raise ValueError(f"num_cores must divide value_dim ({self.value_dim}), got {self.num_cores}")
        if self.rank_layout == "split" and self.key_dim % self.rank:
            raise ValueError(f"rank must divide key_dim ({self.key_dim}) with rank_layout 'split', got {self.rank}")
        if self.rank == 1 and self.num_cores != 1:
            raise ValueError(f"num_cores must be 1 with rank 1 (additive scores have no core), got {self.num_cores}")
        if self.num_candidates > self.grid_side:
            raise ValueError(f"top_m must be at most the {self.grid_side} keys of a side, got {self.num_candidates}")
        if self.grid_side > 65536:
            raise ValueError(f"sqrt(expansion) * knum must be at most 65536, got {self.grid_side}")
        if self.candidate_ratio != 1 and self.rank == 1:
            raise ValueError(f"candidate_ratio must be 1 with rank 1, which is exact, got {self.candidate_ratio}")
        if not 0 < self.window_share <= 1:
            raise ValueError(f"window_share must be in (0, 1], got {self.window_share}")
        if self.table != "windows" and (self.table_layers, self.window_share) != (1, 1.0):
            raise ValueError(
                f"table must be 'windows' with table_layers {self.table_layers} and window_share {self.window_share}, "
                f"got {self.table!r}"
            )
        self._check_output()

    def _check_output(self) -> None:
        if self.output == "none" and (self.expansion != 1 or self.value_dim != self.hidden_size):
            raise ValueError(
                f"output must not be 'none' unless expansion is 1 and value_dim is hidden_size ({self.hidden_size}), "
                f"got expansion {self.expansion} and value_dim {self.value_dim}"
            )
        if self.project_bias and self.output != "project":
            raise ValueError(f"project_bias needs output 'project', got {self.output!r}")
        if self.expert_project and not self.expert_dim:
            raise ValueError("expert_project needs an expert_dim of at least 1, got 0")
        if self.expert_dim and not self.expert_project and self.expert_dim != self.hidden_size:
            raise ValueError(
                f"expert_dim must be hidden_size ({self.hidden_size}) without expert_project, got {self.expert_dim}"
            )

    @property
    def grid_side(self) -> int:
        """[n] side of the logical grid, sqrt(E) * knum."""
        return math.isqrt(self.expansion) * self.side

    @property
    def num_values(self) -> int:
        """[N] physical value rows that the layer sees: knum^2, or those of its window."""
        return self.side**2

    @property
    def table_rows(self) -> int:
        """Rows of the table that the layer reads."""
        return self.table_layers * self.knum**2

    @property
    def side(self) -> int:
        """Side of the physical rows that the layer sees: knum, or that of its window."""
        return math.isqrt(int(self.table_rows * self.window_share)) if self.table == "windows" else self.knum

    @property
    def num_candidates(self) -> int:
        """[m'] slots per head that Tucker selection finds candidates for."""
        return math.ceil(self.candidate_ratio * self.top_m)

    @property
    def num_slots(self) -> int:
        """[K] slots read per token, m * H."""
        return self.top_m * self.num_heads

    @property
    def rank_key_dim(self) -> int:
        """Width of one rank's key."""
        return self.key_dim // self.rank if self.rank_layout == "split" else self.key_dim
