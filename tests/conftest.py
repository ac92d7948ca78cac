"""Settings of the whole test run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch._functorch.config

# Triton reads this at its first import. Without a GPU its kernels run in the interpreter; tests that compile kernels
# do so in a subprocess that drops the variable.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def _no_stale_graphs() -> Iterator[None]:
    # This cache of torch.compile knows an op by its name: after an edit of the op's body it would serve the old one.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
