"""TensorRT's Python package and a GPU, or one line that says which is missing and what to install."""

from __future__ import annotations

import importlib
from typing import Any

import torch

INSTALL = "pip install tensorrt, with NVIDIA's libraries for your CUDA; see docs/tensorrt.md"


def require_tensorrt() -> Any:
    """The module `tensorrt`.

    Raises:
        ImportError: it is not installed, or its libraries are not.
    """
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        missing = getattr(error, "name", None) == "tensorrt"
        what = "TensorRT is not installed" if missing else f"TensorRT's libraries cannot be loaded: {error}"
        raise ImportError(f"{what} ({INSTALL})") from error
    except (OSError, RuntimeError) as error:  # bindings without the libraries that they call
        raise ImportError(f"TensorRT's libraries cannot be loaded: {error} ({INSTALL})") from error


def require_gpu() -> None:
    """Raise unless there is a GPU: an engine is timed on, and made for, the very one that builds it.

    Raises:
        ValueError: there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError("a TensorRT engine is built and run on an NVIDIA GPU, and PyTorch sees none here")
