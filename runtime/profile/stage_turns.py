"""Instrumented forwards beside plain ones, so that the instruments' sums can be held to the plain wall time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ultramem.runtime.profile.measure import Cell, time_us
from ultramem.runtime.profile.operator_work import Work
from ultramem.runtime.profile.schema import StageTimes
from ultramem.runtime.profile.stages import Run, Turn, not_separable, summarize, with_work

TURNS = 5
_CHANGES = 2
"""Between plain and instrumented forwards in a turn: a shared machine has speeds that last for some forwards each."""
_SETTLING = 5
"""Calls before the plain ones that are timed: threads of the instrumented forwards before may still spin."""


class NotSeparableError(Exception):
    """An engine's forward cannot be divided; the message says why."""


def stages_in_turns(
    cell: Cell,
    method: str,
    instrumented: Callable[[int], Sequence[Run]],
    work: Callable[[], Mapping[str, Work]],
    *,
    repeats: int,
    device: torch.device,
) -> StageTimes:
    """Plain forwards of the cell and instrumented ones take turns.

    Args:
        cell: what is timed plainly.
        method: how the stages are told apart.
        instrumented: as many instrumented forwards as it is told; raises `NotSeparableError` where it cannot.
        work: that of each node, by its name; asked for after the last of them.
        repeats: of each kind, over all turns.
        device: where the work ends.
    """
    each = max(1, -(-repeats // (TURNS * _CHANGES)))
    turns = []
    for _ in range(TURNS):
        plain_us: list[float] = []
        runs: list[Run] = []
        for _ in range(_CHANGES):
            for _ in range(_SETTLING):
                cell.call()
            plain_us += [time_us(cell.call, device) for _ in range(each)]
            try:
                runs += instrumented(each)
            except NotSeparableError as error:
                return not_separable(cell, str(error))
        turns.append(Turn(plain_us, runs))
    return with_work(summarize(cell, method, turns), work())
