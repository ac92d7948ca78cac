"""What an exchange of rows is about: the sizes of one lookup, and the types that go over the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ultramem.config import MemoryConfig
from ultramem.config.fields import require_fields_at_least

Placement = Literal["replicate", "rows", "columns"]
Pooling = Literal["home", "owner"]
Kind = Literal["all_to_all", "all_gather", "reduce_scatter", "all_reduce"]
Phase = Literal["forward", "backward"]

LARGEST_INT32_COUNT = 2**31
"""So many rows have numbers that fit an int32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LookupShape:
    """One lookup of one rank. The paper's symbols stand in brackets.

    Raises:
        ValueError: a field is out of range; the message names the field, the value and what is accepted.
    """

    tokens: int
    """[T] of this rank."""
    slots: int
    """[K] rows that a token reads, top-m times heads."""
    value_dim: int
    """[Dv] width of a value row."""
    table_rows: int
    """[N] of the whole table, over all ranks."""
    cores: int = 1
    """[C] scores a slot."""
    blocks: int = 1
    """[E] virtual blocks, each pooled by itself."""
    expert_dim: int = 0
    """[Dp] width of a slot's input row, where slots are one-neuron experts."""

    def __post_init__(self) -> None:
        require_fields_at_least(self, 1, "tokens", "slots", "value_dim", "table_rows", "cores", "blocks")
        require_fields_at_least(self, 0, "expert_dim")

    @property
    def reads(self) -> int:
        """Rows that all tokens of the rank read, repeated ones counted each time."""
        return self.tokens * self.slots


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """Bytes of one number on the wire, by what it is."""

    row_bytes: int = 2
    """Of a number in a row, pooled or not."""
    score_bytes: int = 2
    gradient_bytes: int = 2
    """Of a number in the gradient of a row, pooled or not."""
    score_gradient_bytes: int = 2
    replica_gradient_bytes: int = 4
    """Of a number in the gradient of a table, or of a part of one, that several ranks have: as in the table."""
    index_bytes: int | None = None
    """None: 4 where every row (or virtual row) has a number below 2^31, else 8."""
    count_bytes: int = 8
    """Of how many rows one rank asks another for, sent ahead of the indices. 0: the ranks know."""

    def __post_init__(self) -> None:
        require_fields_at_least(
            self, 1, "row_bytes", "score_bytes", "gradient_bytes", "score_gradient_bytes", "replica_gradient_bytes"
        )
        require_fields_at_least(self, 0, "count_bytes")
        if self.index_bytes not in (None, 4, 8):
            raise ValueError(f"index_bytes must be 4, 8 or None, got {self.index_bytes}")

    def index_bytes_for(self, shape: LookupShape, *, virtual: bool = False) -> int:
        """Bytes of the number of a row, or of a virtual row, of which there are `blocks` times as many."""
        if self.index_bytes is not None:
            return self.index_bytes
        return 4 if shape.table_rows * (shape.blocks if virtual else 1) <= LARGEST_INT32_COUNT else 8


PAPER_WIRE = Wire(index_bytes=4, count_bytes=0)
"""Of Appendix D: 4 bytes an index, 2 a score and a row's number, nothing sent ahead."""


class Collective(NamedTuple):
    """One collective of one lookup."""

    phase: Phase
    kind: Kind
    payload: str
    """What is sent: "indices", "rows", ..."""
    sent_bytes: int
    """That this rank sends to others; its share to itself is not counted."""

    @property
    def travels(self) -> bool:
        """Whether it is started before the layers that a memory layer skips and awaited after them (in the backward,
        the other way); else the lookup waits for it at once."""
        return self.payload.removeprefix("gradients of ") in ("rows", "pooled rows", "pooled columns")


class Volume(NamedTuple):
    """What one lookup sends, forward and backward."""

    placement: Placement
    pooling: Pooling | None
    """Where rows are added up; None where the placement leaves no choice."""
    collectives: tuple[Collective, ...]

    @property
    def forward_bytes(self) -> int:
        return self._sent("forward")

    @property
    def backward_bytes(self) -> int:
        return self._sent("backward")

    @property
    def total_bytes(self) -> int:
        return self.forward_bytes + self.backward_bytes

    @property
    def label(self) -> str:
        """The placement in words."""
        return self.placement if self.pooling is None else f"{self.placement}, pooled at {self.pooling}"

    def _sent(self, phase: Phase) -> int:
        return sum(each.sent_bytes for each in self.collectives if each.phase == phase)


def lookup_shape(memory: MemoryConfig, tokens: int) -> LookupShape:
    """The lookup of `tokens` tokens in a memory layer."""
    return LookupShape(
        tokens=tokens,
        slots=memory.num_slots,
        value_dim=memory.value_dim,
        table_rows=memory.table_rows,
        cores=memory.num_cores,
        blocks=memory.expansion,
        expert_dim=memory.expert_dim,
    )
