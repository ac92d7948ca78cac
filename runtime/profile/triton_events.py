"""Events of the Triton kernels that Inductor generates, at the cost of an event.

Under the profiler Inductor launches a kernel in a slower way, and describes launch and arguments in its event, which
takes the host as long again as the launch. The name is all that is asked for here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from ultramem.runtime.profile.replaced import replaced

_PROFILER = "autograd_profiler"
"""Where Inductor's launcher asks whether it is profiled."""


@contextmanager
def named_triton_kernels() -> Iterator[None]:
    """In here a kernel's event has its name alone, and the launch inside is as without a profiler."""
    from torch._inductor.runtime import triton_heuristics

    launcher = triton_heuristics.CachingAutotuner
    original = launcher.run
    if not hasattr(
        triton_heuristics, _PROFILER
    ):  # a version of torch that asks elsewhere: its events have the name too
        yield
        return

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C._profiler._RecordFunctionFast(self.inductor_meta.get("kernel_name", "triton kernel")):
            return original(self, *args, **kwargs)

    with (
        replaced(launcher, run=run),
        replaced(triton_heuristics, **{_PROFILER: SimpleNamespace(_is_profiler_enabled=False)}),
    ):
        yield
