"""Every parameter in one group, value tables at their own rate."""

import pytest
import torch

import ultramem


def test_groups_partition_the_parameters(model_config):
    model = ultramem.build_model(model_config)
    groups = ultramem.param_groups(model, lr=1e-3, value_lr_ratio=7.0, weight_decay=0.2)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    by_name = {group["name"]: group for group in groups}
    assert {id(p) for p in by_name["values"]["params"]} == {id(m.table.values_NV) for m in model.memories}
    assert by_name["values"]["lr"] == pytest.approx(7e-3)
    assert by_name["weights"]["lr"] == by_name["scales"]["lr"] == 1e-3
    assert by_name["scales"]["weight_decay"] == 0
    assert by_name["weights"]["weight_decay"] == by_name["values"]["weight_decay"] == 0.2
    torch.optim.AdamW(groups)  # accepts the extra keys


def test_a_memory_layer_in_somebody_elses_model(memory_config):
    model = torch.nn.Sequential(torch.nn.Linear(4, 32), ultramem.UltraMemLayer(memory_config))
    by_name = {group["name"]: group for group in ultramem.param_groups(model, lr=1.0)}
    assert by_name["values"]["params"] == [model[1].table.values_NV]
    assert by_name["values"]["lr"] == 10.0


def test_negative_rates_are_named(model_config):
    with pytest.raises(ValueError, match=r"value_lr_ratio must be at least 0, got -1"):
        ultramem.param_groups(ultramem.build_model(model_config), lr=1.0, value_lr_ratio=-1)
