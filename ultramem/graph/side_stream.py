"""A stream for what runs beside the layers that it skips (the paper's asynchronous execution)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """Starts work where its input is ready, to be awaited where its output is used.

    No tensor has to be recorded on the other stream: the input lives until the output is awaited, and what the side
    stream allocates it reuses only for work that begins behind all that the caller had asked for until then.

    Args:
        streams: the device's module of streams, such as `torch.cuda`.
    """

    def __init__(self, streams: Any) -> None:
        self._streams = streams
        self._stream = streams.Stream()

    def __deepcopy__(self, memo: dict[int, object]) -> SideStream:
        """Itself: copies of a model may share a stream."""
        return self

    @classmethod
    def of(cls, device: torch.device) -> SideStream:
        """One on `device`."""
        streams = torch.get_device_module(device)
        with streams.device(device):
            return cls(streams)

    def begin(self, function: Callable[[], Tensor], *inputs: Tensor | None) -> Callable[[], Tensor]:
        """Start `function`, which reads `inputs`; what is returned waits for its result, and returns that."""
        self._stream.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._stream):
            output = function()
            done = self._stream.record_event()
        alive = list(inputs)

        def finish() -> Tensor:
            self._streams.current_stream().wait_event(done)
            alive.clear()
            return output

        return finish
