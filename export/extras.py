"""Optional libraries: one clear error where they are missing, and none of their noise."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import `module`.

    Raises:
        ImportError: it is not installed; the message names the extra of this package that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed (pip install ultramem[{extra}])") from error


@contextlib.contextmanager
def quiet_exporters() -> Iterator[None]:
    """Keep from users what they can do nothing about while torch's exporters run."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it reports that torchvision, which we do not use, is not installed
    try:
        with warnings.catch_warnings():
            # torch 2.13 copies its own tree specs in a way that it deprecates.
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
            yield
    finally:
        logger.setLevel(before)
