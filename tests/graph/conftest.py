"""Small configurations that still have every part."""

import pytest
import torch

import ultramem
from ultramem import MemoryConfig, ModelConfig


@pytest.fixture
def memory_config():
    return MemoryConfig(hidden_size=32, num_layers=3, value_dim=16, key_dim=8, knum=9, top_m=5)


@pytest.fixture
def model_config(memory_config):
    return ModelConfig(
        vocab_size=61,
        hidden_size=32,
        inner_size=48,
        num_heads=2,
        num_layers=3,
        dropout=0.0,
        memory=memory_config,
        insertions="1:2/3:3",
    )


@pytest.fixture
def model(model_config):
    """In eval mode, with convolutions that do something."""
    torch.manual_seed(0)
    model = ultramem.build_model(model_config).eval()
    with torch.no_grad():
        for memory in model.memories:
            memory.query.conv_DW.normal_()
    return model
