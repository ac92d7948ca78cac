"""What the optimisers of tables share: the touched rows, the debt of the others, rounding, resuming.

Shapes: N rows, D columns, U touched rows, S steps (or more) in the schedule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ultramem import ops
from ultramem.ops.catch_up import chunk_rows
from ultramem.ops.update_rows import write_rows_
from ultramem.optim.schedule import advance_, new_schedule, of_any_length, with_room_for
from ultramem.optim.sparse_gradient import coalesced

Group = dict[str, Any]
State = dict[str, Tensor]

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class TableOptimizer(torch.optim.Optimizer):
    """An optimiser of tables [N,D] that reads and writes touched rows alone; see its subclasses.

    What a dense optimiser would have done to a row in the steps that it missed is made up when the row is touched
    again. Until then the parameter's row is stale: whoever reads it takes `lazy_rows` into account (a `ValueTable`
    does, once `attach`ed), or calls `sync` first.

    A gradient may be sparse (COO, any order, rows repeated) or dense; a dense one touches every row. bfloat16 tables
    are updated in float32 and rounded stochastically. The state of a parameter is tensors only, all of them under
    `state[parameter]`; assigning a saved dict there resumes to the same bits.
    """

    betas: tuple[float, float] | None
    """Of the momentum whose missed steps are made up; None without momentum."""

    def __init__(self, params: Any, *, lr: float, weight_decay: float, eps: float, seed: int) -> None:
        for name, number in (("lr", lr), ("weight_decay", weight_decay)):
            if not number >= 0:
                raise ValueError(f"{name} must be at least 0, got {number}")
        if not eps > 0:
            raise ValueError(f"eps must be above 0, got {eps}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.eps = eps
        self.seed = seed
        self._readers: defaultdict[Tensor, list[Callable[[ops.LazyRows], None]]] = defaultdict(list)
        for parameter in self._parameters():
            if parameter.ndim != 2:
                raise ValueError(f"params must be tables [N,D], got shape {tuple(parameter.shape)}")
            if parameter.dtype not in _DTYPES:
                accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
                raise TypeError(f"params must have a dtype of {accepted}, got {parameter.dtype}")
        self._restart({})

    def lazy_rows(self, parameter: Tensor) -> ops.LazyRows:
        """What `parameter`'s stale rows are made up from. Holds the state's own tensors, so it stays true."""
        state = self.state[parameter]
        return ops.LazyRows(
            state["schedule"],
            state["step"],
            state["last_step"],
            state.get("exp_avg"),
            state.get("exp_avg_sq"),
            self.eps,
        )

    def attach(self, parameter: Tensor, show: Callable[[ops.LazyRows], None]) -> None:
        """Call `show(lazy_rows)` now, and again whenever the tensors in it are replaced by others."""
        self._readers[parameter].append(show)
        show(self.lazy_rows(parameter))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Raises:
            ValueError: a group's lr times weight_decay is not below 1.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["lr"] * group["weight_decay"] < 1:
                raise ValueError(f"lr * weight_decay must be below 1, got {group['lr']} * {group['weight_decay']}")
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_table(parameter, group)
        return loss

    def _step_table(self, parameter: Tensor, group: Group) -> None:
        state = self.state[parameter]
        now = int(state["step"]) + 1
        rows_U, grads_UD = _touched(parameter)
        self._update(parameter, state, group, rows_U, grads_UD, now)
        schedule = with_room_for(state["schedule"], now)
        advance_(schedule, now, lr=group["lr"], weight_decay=group["weight_decay"], betas=self.betas)
        state["step"].fill_(now)
        if schedule is not state["schedule"]:
            state["schedule"] = schedule
            self._show(parameter)

    @torch.no_grad()
    def sync(self) -> None:
        """Bring every row of every table up to date, in place and in chunks; call it before saving the weights.

        Reads and writes the whole table, so not every step. Later steps go on from the same numbers up to rounding
        (and, where eps is not small beside sqrt(v), to first order in eps): it does not steer the training, but a run
        that is to repeat to the bit must sync at the same steps. Checkpoints need no sync: stale rows and the state
        are saved as they are.
        """
        for parameter in self._parameters():
            state = self.state[parameter]
            now = int(state["step"])
            chunk = chunk_rows(parameter)
            for start in range(0, parameter.shape[0], chunk):
                rows_U = torch.arange(start, min(start + chunk, parameter.shape[0]), device=parameter.device)
                fresh_UD = ops.catch_up_rows(parameter, self.lazy_rows(parameter), rows_U)
                write_rows_(parameter, rows_U, fresh_UD, step=now, seed=self.seed)
                self._catch_up_moments(state, rows_U, now)
                state["last_step"].index_fill_(0, rows_U, now)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. (torch's own would cast all state to the dtype of the parameter.)"""
        super().load_state_dict({**state_dict, "state": {}})
        saved = [state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"]]
        self._restart(dict(zip(self._parameters(), saved, strict=True)))

    def _new_state(self, parameter: Tensor) -> State:
        """The state before the first step."""
        return {
            "step": torch.zeros((), dtype=torch.int64, device=parameter.device),
            "schedule": new_schedule(parameter.device),
            "last_step": torch.zeros(parameter.shape[0], dtype=torch.int32, device=parameter.device),
        }

    def _update(
        self, parameter: Tensor, state: State, group: Group, rows_U: Tensor, grads_UD: Tensor, now: int
    ) -> None:
        """Step number `now` of these rows, with what they missed before it."""
        raise NotImplementedError

    def _catch_up_moments(self, state: State, rows_U: Tensor, now: int) -> None:
        """Bring what else is kept by row to `now` (nothing, unless a subclass says so)."""

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _restart(self, saved: dict[Tensor, State]) -> None:
        self.state = _LinkedState(self)
        for parameter in self._parameters():
            self.state[parameter] = saved.get(parameter, {})

    def _show(self, parameter: Tensor) -> None:
        for show in self._readers.get(parameter, ()):
            show(self.lazy_rows(parameter))


class _LinkedState(defaultdict[Tensor, State]):
    """`Optimizer.state`: what is assigned is completed, moved to the parameter's device and shown to its reader."""

    def __init__(self, owner: TableOptimizer) -> None:
        super().__init__(dict)
        self._owner = owner

    def __setitem__(self, parameter: Tensor, state: State) -> None:
        if state:
            state = {name: tensor.to(parameter.device) for name, tensor in state.items()}
            of_any_length(state["schedule"])
        else:
            state = self._owner._new_state(parameter)
        super().__setitem__(parameter, state)
        self._owner._show(parameter)


def _touched(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Touched rows [U], each named once, and their gradients [U,D]."""
    assert parameter.grad is not None
    if parameter.grad.layout == torch.sparse_coo:
        gradient = coalesced(parameter.grad)
        return gradient._indices()[0], gradient._values()
    return torch.arange(parameter.shape[0], device=parameter.device), parameter.grad


def _update_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


__all__ = ["Group", "State", "TableOptimizer"]
