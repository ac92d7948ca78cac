"""Counts against what a model on the meta device holds; the paper's own figures are in test_presets."""

import time

import pytest
import torch

import ultramem


@pytest.mark.parametrize("name", ultramem.presets())
def test_arithmetic_equals_the_built_model(name):
    config = ultramem.preset(name)
    with torch.device("meta"):
        model = ultramem.build_model(config)
    counts = ultramem.count(config)
    assert counts.total_with_embeddings == sum(parameter.numel() for parameter in model.parameters())
    tables = sum(table.numel() for name, table in model.named_parameters() if "table." in name)
    experts = sum(each.numel() for name, each in model.named_parameters() if name.endswith(("_EDI", "_EID")))
    assert counts.sparse == tables + experts
    assert counts.total == counts.dense + counts.sparse


def test_counting_is_instant():
    config = ultramem.preset("ultramem-1.6b-x12")
    began = time.perf_counter()
    ultramem.count(config)
    assert time.perf_counter() - began < 0.1  # 21 billion parameters: nothing can have been built


def test_unknown_preset_is_named_with_a_suggestion():
    with pytest.raises(
        ValueError, match=r"preset must be one of .*got 'ultramem-tny' \(did you mean ultramem-tiny\?\)"
    ):
        ultramem.preset("ultramem-tny")


def test_count_wants_a_config():
    with pytest.raises(TypeError, match="config must be a ModelConfig"):
        ultramem.count("ultramem-tiny")
