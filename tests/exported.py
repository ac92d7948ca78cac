"""One small model and its exports, made once in a test run by whichever worker needs them first."""

import os
from pathlib import Path

import torch
from filelock import FileLock

import ultramem
from ultramem import MemoryConfig, ModelConfig
from ultramem.export import export_model

MEMORY = MemoryConfig(hidden_size=32, num_layers=2, value_dim=16, key_dim=8, knum=8, top_m=4)
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    inner_size=48,
    num_heads=2,
    num_layers=2,
    dropout=0.1,
    memory=MEMORY,
    insertions="1:2",
)
DENSE = ModelConfig(vocab_size=64, hidden_size=16, inner_size=24, num_heads=2, num_layers=1)


def build(config):
    """A model in eval mode whose convolutions do something."""
    torch.manual_seed(0)
    model = ultramem.build_model(config).eval()
    with torch.no_grad():
        for memory in model.memories:
            if memory.query.conv_DW is not None:
                memory.query.conv_DW.normal_()
    return model


def once(tmp_path_factory, name) -> FileLock:
    """A lock that all workers of a test run share."""
    return FileLock(_shared_folder(tmp_path_factory) / f"{name}.lock")


def export_once(tmp_path_factory, engine) -> Path:
    """The folder of CONFIG's export for `engine`."""
    folder = _shared_folder(tmp_path_factory) / f"export-{engine}"
    with once(tmp_path_factory, folder.name):
        if not folder.exists():
            export_model(build(CONFIG), engine, folder)
    return folder


def _shared_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # each worker has a folder of its own there
