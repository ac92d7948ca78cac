"""Which part of every value table a process holds (paper, Appendix D).

Shapes: N rows, V value dim, P ranks that make up a whole table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Placement = Literal["rows", "columns"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TableShard:
    """How tables are spread over the last dimension of a mesh; along the dimension before it, if any, are copies.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    placement: Placement
    """"rows" (number-wise): a rank holds `ceil(N/P)` whole rows. "columns" (dimension-wise): V/P columns of each."""
    mesh: DeviceMesh
    """One dimension (P), or two (copies, P)."""
    deduplicate: bool = True
    """Placement by rows: a row that several slots read is asked for once."""
    pool: Literal["home", "owner"] = "home"
    """Placement by rows: whether rows travel, or what their owner pooled of them, which is less for few ranks."""
    exchange_dtype: torch.dtype | None = None
    """In which values and their gradients travel; None: that of the table."""
    tokens: Literal["own", "same"] = "own"
    """Whether each rank has tokens of its own, as in training, or all have the same, as where they generate together:
    then nobody asks for rows, since each rank knows what is read of its part. "same" takes no gradients."""

    def __post_init__(self) -> None:
        import torch.distributed._functional_collectives  # noqa: F401  # registers the operators of exchanges

        if self.placement not in ("rows", "columns"):
            raise ValueError(f"placement must be rows or columns, got {self.placement!r}")
        if self.pool not in ("home", "owner"):
            raise ValueError(f"pool must be home or owner, got {self.pool!r}")
        if self.tokens not in ("own", "same"):
            raise ValueError(f"tokens must be own or same, got {self.tokens!r}")
        if self.mesh.ndim not in (1, 2):
            raise ValueError(f"mesh must have one dimension or two, got {self.mesh.ndim}")

    def __deepcopy__(self, memo: dict[int, object]) -> TableShard:
        """Itself: copies of a model talk to the same ranks."""
        return self

    @property
    def ranks(self) -> int:
        """P."""
        return self.mesh.size(-1)

    @property
    def rank(self) -> int:
        """Of this process among the P."""
        return self.mesh.get_local_rank(self.mesh.ndim - 1)

    @property
    def group(self) -> str:
        """Name of the process group of the P ranks."""
        return str(self.mesh.get_group(self.mesh.ndim - 1).group_name)

    @property
    def dimension(self) -> int:
        """Of a table, that is cut."""
        return 0 if self.placement == "rows" else 1

    def rows_per_rank(self, rows: int) -> int:
        """Of all ranks but the last, which may hold fewer."""
        return -(-rows // self.ranks)

    def require_fits(self, name: str, rows: int, columns: int) -> None:
        """Raise unless a table can be cut in this way.

        Raises:
            ValueError: with the name and the size.
        """
        if self.placement == "columns" and columns % self.ranks:
            raise ValueError(f"{name} must be a multiple of the {self.ranks} ranks that share columns, got {columns}")
        if self.placement == "rows" and self.rows_per_rank(rows) * (self.ranks - 1) >= rows:
            raise ValueError(f"a table of {rows} rows is too small for {self.ranks} ranks to have some of them each")

    def slices(self, rows: int, columns: int) -> tuple[slice, slice]:
        """The rows and columns that this process holds."""
        if self.placement == "rows":
            step = self.rows_per_rank(rows)
            first = min(self.rank * step, rows)
            return slice(first, min(first + step, rows)), slice(0, columns)
        width = columns // self.ranks
        return slice(0, rows), slice(self.rank * width, (self.rank + 1) * width)

    def as_dtensor(self, local: Tensor, shape: tuple[int, ...], *, cut: bool = True) -> DTensor:
        """The whole tensor, of which `local` is this process's part (or, unless `cut`, a copy)."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements: list[Replicate | Shard] = [Replicate()] * self.mesh.ndim
        if cut:
            placements[-1] = Shard(self.dimension)
        stride = [1] * len(shape)
        for axis in reversed(range(len(shape) - 1)):
            stride[axis] = stride[axis + 1] * shape[axis + 1]
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
        )
