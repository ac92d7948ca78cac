"""Every tiny preset trains, compiled: one graph, no recompile, and after 200 steps better than a unigram model."""

import math

import pytest
import torch

import ultramem
from ultramem import TrainConfig, preset, preset_training
from ultramem.runtime.data import load_corpus
from ultramem.runtime.train import train
from ultramem.runtime.unigram import unigram_loss

TINY = [name for name in ultramem.presets() if name.endswith("-tiny")]


@pytest.fixture(scope="module")
def corpus():
    return load_corpus("austen")


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_200_steps_beat_a_unigram_model(name, corpus, tmp_path):
    config = TrainConfig(
        steps=200,
        batch_size=2,
        sequence_length=128,
        lr=2e-3,
        eval_every=0,
        final_eval_tokens=4096,
        checkpoint_every=200,
        **preset_training(name),
    )
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["graph_break"].copy()
    with torch._dynamo.config.patch(error_on_recompile=True):
        result = train(preset(name), config, corpus, tmp_path / "run")
    assert torch._dynamo.utils.counters["graph_break"] == frames
    tokens = torch.cat([*corpus.train])
    unigram = unigram_loss(tokens, corpus.tokenizer.vocab_size)
    assert 2.5 < unigram < 3.5  # English by the byte
    assert math.isfinite(result.held_out.loss)
    assert result.held_out.loss < unigram
