"""Every implementation of an op, with the memory that they allocate poisoned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ultramem.ops import Implementation, use_implementation
from ultramem.ops.implementation import triton_is_installed


def _poisoned(allocate: Any) -> Any:
    def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = allocate(*args, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).min)

    return poison


@pytest.fixture(params=list(Implementation)[1:], ids=lambda i: i.value)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Implementation]:
    """ATEN, TRITON (in the interpreter where there is no GPU), NATIVE; memory that a kernel leaves unwritten shows."""
    if request.param is Implementation.TRITON and not triton_is_installed():
        pytest.skip("Triton is not installed")
    if request.param is Implementation.NATIVE and torch.cuda.is_available():
        pytest.skip("the C++ kernels take tensors on the CPU")
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    deterministic = torch.are_deterministic_algorithms_enabled()
    # What C++ allocates is poisoned by PyTorch itself, in this mode.
    torch.use_deterministic_algorithms(deterministic or request.param is Implementation.NATIVE)
    with use_implementation(request.param):
        yield request.param
    torch.use_deterministic_algorithms(deterministic)
