"""How a run is spread over ranks. It changes a run's numbers by rounding alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ultramem.config.fields import require_fields_at_least, require_literals


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How a run is spread over the ranks that `torchrun` starts; one process needs none of it.

    The mesh of a run is (table_copies, ranks / table_copies): along its last dimension tables are cut, along the first
    they are copied. Batches are spread over all ranks.

    Raises:
        ValueError: a field is out of range; the message names the field, the value and what is accepted.
    """

    table_placement: Literal["replicate", "rows", "columns", "auto"] = "auto"
    """Of the value tables: whole on every rank, cut by rows or by columns, or whichever sends the fewest bytes."""
    table_copies: int = 1
    """Copies of each cut table, as of one a node; must divide the number of ranks."""
    deduplicate: bool = True
    """By rows: a row that several slots of a rank read is sent to it once."""
    pool: Literal["auto", "home", "owner"] = "auto"
    """By rows: whether rows travel, or what their owner pooled of them; auto: what sends fewer bytes."""
    exchange_dtype: Literal["table", "bfloat16"] = "table"
    """In which values and their gradients travel."""
    dense: Literal["replicate", "fsdp"] = "replicate"
    """Of all other weights and their optimiser's state: whole on every rank, or cut by FSDP2."""
    expert_parallel: bool = False
    """Whether the experts of a mixture are spread over the ranks that share a table."""
    timeout_s: float = 600.0
    """Seconds after which a rank gives up waiting for another, and the run ends."""

    def __post_init__(self) -> None:
        require_fields_at_least(self, 1, "table_copies", "timeout_s")
        require_literals(self)
