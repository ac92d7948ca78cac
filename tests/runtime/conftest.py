"""A run that trains in seconds, uncompiled."""

import pytest

from ultramem import MemoryConfig, ModelConfig, TrainConfig

SMALL = ModelConfig(
    vocab_size=257,
    hidden_size=32,
    inner_size=48,
    num_heads=2,
    num_layers=2,
    dropout=0.1,
    memory=MemoryConfig(hidden_size=32, num_layers=2, value_dim=16, key_dim=8, knum=8, top_m=4),
    insertions="1:2",
)


@pytest.fixture
def small_model():
    return SMALL


@pytest.fixture
def small_train():
    return TrainConfig(
        steps=6, batch_size=2, sequence_length=16, compile=False, checkpoint_every=2, eval_every=3, eval_tokens=64
    )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It is a truth universally acknowledged. " * 40)
    return str(path)
