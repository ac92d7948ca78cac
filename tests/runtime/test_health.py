"""Health of the memory: figures that hold for known use, exact over a resume, and no effect on training."""

import json
import math
from dataclasses import replace

import pytest
import torch

import ultramem
from ultramem.graph.value_table import ValueTable
from ultramem.runtime.data import IGNORE, Batch, load_corpus
from ultramem.runtime.health import MemoryHealth, kl_from_uniform
from ultramem.runtime.run import RunFolder
from ultramem.runtime.train import train


@pytest.fixture
def model(small_model):
    torch.manual_seed(0)
    return ultramem.build_model(replace(small_model, dropout=0.0))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 257, (2, 17), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:].clone())


def table_of(model):
    (table,) = (module for module in model.modules() if isinstance(module, ValueTable))
    return table


def test_kl_from_uniform():
    assert kl_from_uniform(torch.tensor([3, 3, 3, 3])) == 0
    assert kl_from_uniform(torch.tensor([0, 5, 0, 0])) == pytest.approx(math.log(4))
    assert kl_from_uniform(torch.tensor([1, 1, 0, 0])) == pytest.approx(math.log(2))
    assert kl_from_uniform(torch.tensor([0, 0])) is None


def test_use_of_rows_ever_and_lately(model, batch):
    health = MemoryHealth(model)
    use = table_of(model).row_use_N
    use[:16] = 2
    first, _ = health.report(batch)
    assert first["kind"] == "value_table"
    assert (first["rows"], first["reads"]) == (64, 32)
    assert (first["used_lately"], first["used_ever"], first["dead_rows"]) == (0.25, 0.25, 48)
    assert first["kl_from_uniform_nats"] == pytest.approx(math.log(4))
    use[8:24] = 1
    second, _ = health.report(batch)
    assert (second["used_lately"], second["used_ever"], second["dead_rows"]) == (0.25, 24 / 64, 40)
    third, _ = health.report(batch)
    assert (third["reads"], third["used_lately"], third["used_ever"]) == (0, 0, 24 / 64)
    assert third["kl_from_uniform_nats"] is None


def test_reads_are_those_of_training_alone(model, batch):
    health = MemoryHealth(model)
    model(batch.inputs_BS)
    health_row, _ = health.report(batch)  # runs the model itself, in eval mode
    slots = model.config.memory.num_slots
    assert health_row["reads"] == batch.inputs_BS.numel() * slots
    assert int(table_of(model).row_use_N.sum()) == 0


def test_figures_of_a_layer(model, batch):
    """Against the layer's own stages, on the tokens that count."""
    batch.targets_BS[1, 5:] = IGNORE
    health = MemoryHealth(model)
    _, row = health.report(batch)
    layer = model.memories[0]
    inputs = []
    handle = layer.register_forward_hook(lambda _, args, output: inputs.append((args[0], output)))
    with torch.no_grad():
        model.eval()(batch.inputs_BS)
    handle.remove()
    (hidden, output), counted = inputs[0], batch.targets_BS != IGNORE
    with torch.no_grad():
        scores = layer.select(*layer.score(layer.query(hidden))).scores.sum(-1)[counted.flatten()]
    assert (row["kind"], row["name"]) == ("memory_layer", "memories.0")
    assert row["score_mean"] == pytest.approx(float(scores.mean()), rel=1e-5)
    assert row["score_variance"] == pytest.approx(float(scores.var(correction=0)), rel=1e-5)
    assert row["output_rms"] == pytest.approx(float(output[counted].square().mean().sqrt()), rel=1e-5)
    expected = [torch.linalg.svdvals(core.sum(0)).tolist() for core in layer.select.cores_HCRR]
    assert torch.tensor(row["singular_values"]).allclose(torch.tensor(expected))


def test_a_report_leaves_no_trace(model, batch):
    health = MemoryHealth(model)
    model.train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    health.report(batch)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    json.dumps(health.report(batch), allow_nan=False)


def _rows(folder, kind):
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in RunFolder(folder).read_metrics()
        if row.get("kind") == kind
    ]


class _StopAt:
    def __init__(self, step):
        self.at = step

    def message(self, text):
        pass

    def evaluation(self, row):
        pass

    def step(self, row, steps):
        if row["step"] == self.at:
            raise RuntimeError("pulled the plug")


def test_reports_do_not_change_training_and_go_on_after_a_resume(small_model, small_train, text, tmp_path):
    corpus = load_corpus(text)
    config = replace(small_train, health_every=3)  # checkpoints are at even steps: half of the counts are in them
    train(small_model, replace(config, health_every=0), corpus, tmp_path / "without")
    train(small_model, config, corpus, tmp_path / "with")
    with pytest.raises(RuntimeError, match="plug"):
        train(small_model, config, corpus, tmp_path / "cut", progress=_StopAt(5))
    train(small_model, config, corpus, tmp_path / "cut", resume=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("without", "with", "cut")]
    assert weights[0] == weights[1] == weights[2]
    assert _rows(tmp_path / "without", "value_table") == []
    for kind in ("value_table", "memory_layer"):
        assert [row["step"] for row in _rows(tmp_path / "with", kind)] == [3, 6]
        assert _rows(tmp_path / "cut", kind) == _rows(tmp_path / "with", kind)
    tables = _rows(tmp_path / "with", "value_table")
    assert tables[1]["reads"] == 3 * 2 * 16 * small_model.memory.num_slots
    assert tables[0]["used_ever"] <= tables[1]["used_ever"]


def test_a_dense_model_has_nothing_to_report(small_model, batch):
    model = ultramem.build_model(replace(small_model, memory=None, insertions=""))
    assert MemoryHealth(model).report(batch) == []


def test_a_layer_without_cores_has_no_singular_values(small_model, batch):
    memory = replace(small_model.memory, rank=1, num_cores=1)
    model = ultramem.build_model(replace(small_model, memory=memory))
    _, row = MemoryHealth(model).report(batch)
    assert "singular_values" not in row
    assert row["score_mean"] > 0
