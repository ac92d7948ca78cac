"""A decode step that is recorded and replayed: on a GPU as a CUDA graph, one launch in the place of hundreds.

What is recorded reads and writes the same memory at every replay, so that a step has inputs and results of its own, and
the buffers of keys and values belong to it. Buffers that no cache needs any more go to the next one of their size, with
the step that was recorded on them.

Shapes: B batch, C columns of room.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ultramem.runtime.engine_cache import Room, fill, make_buffers

Step = Callable[..., Sequence[Tensor]]
PLAIN_RUNS = 3
"""Before the recording: what compiles or asks for workspaces at its first calls does so there, and buffers that are
given up after a few steps are not worth one."""
_MOST_FREE = 4
"""Buffers without a cache, of any size, that are kept for the next one."""


class DecodeReplay:
    """A step that is run a few times, then recorded, and from then on replayed.

    Args:
        step: of the inputs, which writes keys and values to buffers in place, and takes nothing from the host.
        inputs: of the first step, on the device or on the CPU; those of later ones have their shapes.
        graphs: the device's module of graphs, such as `torch.cuda`.
        device: where the step runs.
    """

    def __init__(self, step: Step, inputs: Sequence[Tensor], graphs: Any, device: torch.device) -> None:
        self._step, self._graphs = step, graphs
        self._inputs = tuple(each.to(device, copy=True) for each in inputs)
        self._plain_runs = 0
        self._recording: Any = None
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, inputs: Sequence[Tensor], *, plainly: bool = False) -> tuple[Tensor, ...]:
        """What the step gives for these inputs, in memory of its own; `plainly`, it is run and not replayed."""
        for own, new in zip(self._inputs, inputs, strict=True):
            own.copy_(new)
        if plainly or self._plain_runs < PLAIN_RUNS:
            self._plain_runs += 1
            return tuple(self._step(*self._inputs))
        if self._recording is None:
            self._record()
        self._recording.replay()
        return tuple(each.clone() for each in self._outputs)

    def _record(self) -> None:
        recording = self._graphs.CUDAGraph()
        with self._graphs.graph(recording):
            self._outputs = tuple(self._step(*self._inputs))
        self._recording = recording


class ReplayedRooms:
    """Rooms of caches whose steps are replayed.

    Args:
        graphs: as of `DecodeReplay`.
    """

    def __init__(self, graphs: Any) -> None:
        self._graphs = graphs
        self._held: list[_Buffers] = []
        """In the order in which they were last given to a cache."""
        self._plainly = False

    @contextmanager
    def plain_steps(self) -> Iterator[None]:
        """In here steps run on the memory that they were recorded on, or will be, and are not replayed."""
        before, self._plainly = self._plainly, True
        try:
            yield
        finally:
            self._plainly = before

    def make(self, keys_and_values: Sequence[Tensor], num_columns: int, capacity: int) -> Room:
        """A room of `capacity` columns with the first `num_columns` of these, the others 0: a step looks at them all,
        and what is hidden from it must be finite all the same.
        """
        size = (keys_and_values[0].shape[0], capacity)
        held = next((each for each in self._held if each.is_free and each.size == size), None)
        if held is None:
            held = _Buffers(make_buffers(keys_and_values, capacity))
        else:
            self._held.remove(held)
        fill(held.tensors, keys_and_values, num_columns)
        for buffer in held.tensors:
            buffer[:, :, num_columns:] = 0
        room = Room(held.tensors, num_columns)
        held.room = weakref.ref(room)
        free = [each for each in self._held if each.is_free]
        for oldest in free[: max(0, len(free) - _MOST_FREE)]:
            self._held.remove(oldest)
        self._held.append(held)
        return room

    def step(self, step: Step, room: Room, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run `step` for a cache in `room`: recorded after a few for its buffers, replayed from then on."""
        held = next(each for each in self._held if each.room() is room)
        if held.replay is None:
            held.replay = DecodeReplay(step, inputs, self._graphs, room.buffers[0].device)
        return held.replay(inputs, plainly=self._plainly)


class _Buffers:
    """Keys and values of every layer [B,A,C,X], who has them, and the step that was recorded on them."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors
        self.room: Callable[[], Room | None] = lambda: None
        self.replay: DecodeReplay | None = None

    @property
    def is_free(self) -> bool:
        """Whether the cache that had them is gone."""
        return self.room() is None

    @property
    def size(self) -> tuple[int, int]:
        """Sequences, and columns of room."""
        return self.tensors[0].shape[0], self.tensors[0].shape[2]
