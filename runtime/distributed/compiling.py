"""What a compiler is told where tensors travel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._inductor.config

from ultramem.runtime.distributed.ranks import Ranks


@contextmanager
def compiling_exchanges(ranks: Ranks) -> Iterator[None]:
    """Settings of torch.compile in here, if there are several ranks.

    How many rows go to which rank is read on the host, in one graph with the rest. And Inductor keeps the order of the
    model, in which an exchange starts before the layers that it runs beside: to save memory it would move them.
    """
    if ranks.size == 1:
        yield
        return
    with (
        torch._dynamo.config.patch(capture_scalar_outputs=True),
        torch._inductor.config.patch(reorder_for_peak_memory=False),
    ):
        yield
