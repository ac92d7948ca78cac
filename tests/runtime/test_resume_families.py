"""Resuming to the same bits: every family with every table optimiser."""

from dataclasses import replace

import pytest
from families import as_pkm

from ultramem import MemoryConfig, ModelConfig, MoEConfig
from ultramem.runtime.data import load_corpus
from ultramem.runtime.run import RunFolder
from ultramem.runtime.train import train

DENSE = ModelConfig(vocab_size=257, hidden_size=32, inner_size=48, num_heads=2, num_layers=2, dropout=0.1)
ULTRAMEM = MemoryConfig(hidden_size=32, num_layers=2, value_dim=16, key_dim=8, knum=8, top_m=4)
PKM = as_pkm(ULTRAMEM)
FAMILIES = {
    "dense": DENSE,
    "moe": replace(DENSE, inner_size=24, moe=MoEConfig(num_experts=4)),
    "pkm": replace(DENSE, memory=PKM, insertions="1:1"),
    "ultramem": replace(DENSE, memory=replace(ULTRAMEM, candidates="two_tailed"), insertions="1:2"),
    "memory-plus": replace(
        DENSE, memory=replace(PKM, table="shared", output="gated"), insertions="1:1/2:2", replace_mlp=True
    ),
    "peer": replace(DENSE, memory=replace(PKM, expert_dim=32), insertions="2:2", replace_mlp=True),
    "ultramem-v2": replace(
        DENSE,
        memory=replace(ULTRAMEM, expert_dim=8, expert_project=True, table="windows", table_layers=2, window_share=0.5),
        insertions="1:1/2:2",
    ),
}


class _PullThePlug:
    """Ends a run between two steps, at a step without a checkpoint."""

    def message(self, text):
        pass

    def evaluation(self, row):
        pass

    def step(self, row, steps):
        if row["step"] == 3:
            raise RuntimeError("pulled the plug")


def _metrics(folder):
    timing = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in row.items() if k not in timing} for row in RunFolder(folder).read_metrics()]


@pytest.mark.parametrize("tables", ["adamw", "lazy_adamw", "row_adagrad"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(family, tables, small_train, text, tmp_path):
    config = replace(small_train, steps=5, table_optimizer=tables, accumulate=2)
    corpus, model = load_corpus(text), FAMILIES[family]
    train(model, config, corpus, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="plug"):
        train(model, config, corpus, tmp_path / "cut", progress=_PullThePlug())
    train(model, config, corpus, tmp_path / "cut", resume=True)
    assert _metrics(tmp_path / "cut") == _metrics(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]
