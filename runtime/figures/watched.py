"""How long a call had the processor, beside how long it took: on a busy machine the two differ."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Watched:
    """A call that keeps the processor time of each of its calls, in microseconds, over all threads."""

    call: Callable[[], object]
    cpu_us: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        start = time.process_time_ns()
        self.call()
        self.cpu_us.append((time.process_time_ns() - start) / 1e3)
