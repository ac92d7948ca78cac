"""Where a command runs a model: its options, and the model there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ultramem.graph import Transformer

EXPORTS = ("onnx", "aoti", "tensorrt")
"""Engines that run an export, on the device that it was made for."""


def add_pinned_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--pinned-tables",
        action="store_true",
        help="on a GPU: value tables stay in the host's memory, in locked pages, and their rows cross the bus",
    )


def parse_device(name: str) -> str:
    """The device called `name`, one of this machine's.

    Raises:
        ValueError: it is another.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be one of the {torch.cuda.device_count()} CUDA devices here, got {name!r}")
    return name


def inference_device(
    name: str, engines: Sequence[str], *, mmap: bool = False, pinned_tables: bool = False, ranks: int = 1
) -> str:
    """Where engines run a model; "auto": on the GPU where there is one and all that is asked for can run there.

    Raises:
        ValueError: the device is none of this machine's, or not one for what is asked for.
    """
    exports = [engine for engine in engines if engine in EXPORTS]
    mapped = mmap and not pinned_tables
    on_cpu = bool(exports) or mapped or ranks > 1
    device = "cpu" if name == "auto" and on_cpu else parse_device(name)
    if device != "cpu" and exports:
        raise ValueError(f"device must be auto or cpu for engine {exports[0]!r}, which runs an export, got {name!r}")
    if device != "cpu" and ranks > 1:
        raise ValueError(f"device must be auto or cpu where {ranks} ranks share a model, got {name!r}")
    if device != "cpu" and mapped:
        raise ValueError(f"device must be auto or cpu for mapped weights (or give --pinned-tables), got {name!r}")
    if device == "cpu" and pinned_tables:
        raise ValueError("pinned_tables needs a model on a GPU: eager or compile, in one process")
    return device


def load_there(run_folder: str | Path, device: str, *, mmap: bool = False, pinned_tables: bool = False) -> Transformer:
    """The trained model of a run on a device; with pinned tables, which are read from their file once."""
    from ultramem.graph.pinned_tables import pin_tables
    from ultramem.graph.weights import load

    if pinned_tables:
        return pin_tables(load(run_folder, mmap=True), device)
    return load(run_folder, device=device, mmap=mmap)
