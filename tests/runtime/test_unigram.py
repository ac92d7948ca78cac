"""The loss that training has to beat."""

import math

import pytest
import torch

from ultramem.runtime.unigram import unigram_loss


def test_it_is_the_cross_entropy_of_the_best_model_without_context():
    tokens = torch.tensor([0, 0, 0, 3, 3, 7], dtype=torch.int16)
    assert unigram_loss(torch.arange(16), 16) == pytest.approx(math.log(16))
    assert unigram_loss(torch.full((9,), 5), 6) == 0
    logits = torch.tensor([3.0, 1e-30, 1e-30, 2.0, 1e-30, 1e-30, 1e-30, 1.0]).log()
    expected = torch.nn.functional.cross_entropy(logits.expand(6, -1), tokens.long())
    assert unigram_loss(tokens, 8) == pytest.approx(float(expected))


def test_tokens_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"tokens must be in 0\.\.7, got 8"):
        unigram_loss(torch.tensor([0, 8]), 8)
    with pytest.raises(ValueError, match="at least one token"):
        unigram_loss(torch.tensor([], dtype=torch.int64), 8)
