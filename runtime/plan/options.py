"""What a plan is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ultramem.config.fields import require_fields_at_least, require_literals
from ultramem.runtime.plan.exchange import Wire

ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
TABLE_BYTES = {"float32": 4, "bfloat16": 2}


class Group(NamedTuple):
    """Ranks that have a collective in common."""

    ranks: int
    per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """How a model is to be trained on many ranks.

    Raises:
        ValueError: a field is out of range; the message names the field, the value and what is accepted.
    """

    ranks: int
    ranks_per_node: int = 8
    """Ranks whose links are those within a node."""
    tokens_per_rank: int = 8192
    """Of one forward and backward."""
    accumulate: int = 1
    """Forwards and backwards of a step."""
    sequence_length: int = 2048
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of matrix products, activations and what goes over the wire; weights are float32."""
    placement: Literal["auto", "replicate", "rows", "columns"] = "auto"
    table_copies: int = 1
    """Copies of each cut table, as of one a node; must divide the ranks."""
    dense: Literal["fsdp", "replicate"] = "fsdp"
    """Of all that is no table: cut by FSDP2 between steps and whole from forward to backward, or whole always."""
    table_optimizer: Literal["adamw", "lazy_adamw", "row_adagrad"] = "lazy_adamw"
    table_dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    """Attention and MLPs run again in the backward, in place of keeping what they made."""
    overlap: bool = True
    """Rows travel beside the layers that their memory layer skips."""
    deduplicate: bool = True
    """Rows that a rank reads more than once travel once."""
    distinct_rows: int | None = None
    """Different rows that a rank's lookup reads; None: what uniformly random reads would."""
    network_gbit: float | None = None
    """Gigabits a second of each rank's own network link; None: the device's."""

    def __post_init__(self) -> None:
        require_fields_at_least(
            self, 1, "ranks", "ranks_per_node", "tokens_per_rank", "accumulate", "sequence_length", "table_copies"
        )
        require_literals(self)
        if self.tokens_per_rank % self.sequence_length:
            raise ValueError(
                f"tokens_per_rank must be a multiple of sequence_length ({self.sequence_length}), "
                f"got {self.tokens_per_rank}"
            )
        if self.ranks > self.ranks_per_node and self.ranks % self.ranks_per_node:
            raise ValueError(
                f"ranks must be a multiple of ranks_per_node ({self.ranks_per_node}) beyond one node, got {self.ranks}"
            )
        if self.ranks % self.table_copies:
            raise ValueError(f"table_copies must divide the {self.ranks} ranks, got {self.table_copies}")
        if self.nodes > 1 and self.table_ranks % self.ranks_per_node and self.ranks_per_node % self.table_ranks:
            raise ValueError(
                f"table_copies must give each copy whole nodes of {self.ranks_per_node} ranks or an equal part of one, "
                f"got {self.table_copies} copies of {self.table_ranks} ranks"
            )
        if self.distinct_rows is not None:
            require_fields_at_least(self, 1, "distinct_rows")
        if self.network_gbit is not None and not 0 < self.network_gbit < math.inf:
            raise ValueError(f"network_gbit must be a positive number, got {self.network_gbit}")

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)

    @property
    def table_ranks(self) -> int:
        """Ranks that share one copy of a table."""
        return self.ranks // self.table_copies

    @property
    def everybody(self) -> Group:
        """All ranks."""
        return Group(self.ranks, min(self.ranks, self.ranks_per_node))

    @property
    def table_group(self) -> Group:
        """Those that share a copy of a table: neighbours."""
        return Group(self.table_ranks, min(self.table_ranks, self.ranks_per_node))

    @property
    def copy_group(self) -> Group:
        """Those that have the same part of a table."""
        return Group(self.table_copies, min(self.table_copies, max(1, self.ranks_per_node // self.table_ranks)))

    @property
    def wire(self) -> Wire:
        """Everything but numbers of rows in `dtype`; gradients of copies in that of the table."""
        size = self.element_bytes
        return Wire(
            row_bytes=size,
            score_bytes=size,
            gradient_bytes=size,
            score_gradient_bytes=size,
            replica_gradient_bytes=TABLE_BYTES[self.table_dtype],
        )
