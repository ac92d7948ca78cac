"""Settings of the whole test run."""

from __future__ import annotations

import os
import zlib

import pytest
import torch

# Triton reads this at its first import. Without a GPU its kernels run in the interpreter; tests that compile kernels
# do so in a subprocess that drops the variable.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", help="run this part of the tests: 2/3 is the second of three")
    parser.addoption("--repeat", type=int, default=1, help="run every test so many times in a row")
    parser.addoption("--parity-file", help="append each export's parity there, and skip those that it has")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`-m gpu` selects what runs on a GPU: where there is one, every test that asks for the `device`."""
    index, count = map(int, config.getoption("--shard").split("/"))
    items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % count == index - 1]
    for item in items:
        if torch.cuda.is_available():
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    times = metafunc.config.getoption("--repeat")
    if times > 1:
        metafunc.fixturenames.append("_repetition")
        metafunc.parametrize("_repetition", range(times))


@pytest.fixture
def _repetition() -> None:
    """Parametrized by `--repeat`."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
