"""The weights of a run on disk, whichever ranks hold them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ultramem.graph import weights as whole
from ultramem.graph.sharded_weights import read_parts, write_parts
from ultramem.runtime.distributed import Ranks


def save_weights(model: nn.Module, folder: Path, ranks: Ranks) -> None:
    """Write model.safetensors; several ranks write their parts of it."""
    if ranks.size == 1:
        whole.save_weights(model, folder)
        return
    path = folder / whole.WEIGHTS_FILE
    write_parts(path, dict(model.state_dict()), is_main=ranks.is_main, wait=ranks.wait)


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill the model from a safetensors file, of which a rank reads its part."""
    read_parts(path, dict(model.state_dict()))
