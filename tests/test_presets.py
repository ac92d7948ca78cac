"""Presets against the paper's tables, and the tiny families against each other."""

from dataclasses import asdict

import pytest

import ultramem
from ultramem import ModelConfig, TrainConfig, count, preset, preset_training
from ultramem.config import from_dict, to_dict

# Parameters in billions, FLOPs per token in billions, and how near the table's rounding lets us come.
TABLE_6 = {
    "dense-151m": (0.15, 0.30, 0.007, 0.016),
    "dense-680m": (0.68, 1.36, 0.007, 0.016),
    "dense-1.6b": (1.61, 3.21, 0.007, 0.016),
    "dense-6.5b": (6.44, 12.88, 0.007, 0.016),
    "moe-151m-2in32": (2.04, 0.35, 0.007, 0.016),
    "moe-680m-2in33": (8.95, 1.50, 0.007, 0.016),
    "moe-1.6b-2in34": (21.36, 3.52, 0.007, 0.016),
    # The paper does not say what its PKM's query and keys are, so FLOPs are less certain.
    "pkm-151m-x12": (2.04, 0.35, 0.01, 0.06),
    "pkm-680m-x12": (8.95, 1.50, 0.01, 0.06),
    "pkm-1.6b-x12": (21.13, 3.48, 0.01, 0.06),
    "ultramem-151m-x12": (2.03, 0.35, 0.007, 0.016),
    "ultramem-680m-x12": (8.93, 1.49, 0.007, 0.016),
    "ultramem-1.6b-x12": (21.41, 3.50, 0.007, 0.016),
}

# Table 2: dense parameters in millions, sparse ones in billions, FLOPs per token in millions.
TABLE_2 = {
    "pkm": (173.01, 1.534, 346.06),
    "rm-softmax": (173.01, 1.534, 346.06),
    "half-vdim": (178.47, 1.529, 356.98),
    "share-query": (173.46, 1.529, 346.96),
    "split-skip": (161.64, 1.536, 323.32),
    "qk-norm": (161.64, 1.536, 323.54),
    "ive": (172.37, 1.536, 344.98),
    "tdqkr": (172.37, 1.536, 344.98),
    "mcs": (172.37, 1.536, 344.98),
    "init": (172.37, 1.536, 344.98),
    "value-lr-decay": (172.37, 1.536, 344.98),
    "query-conv": (172.38, 1.536, 345.02),
}

# Table 3: FLOPs in millions and the tolerance. No grid of keys and projections fits all three of its IVE rows: with
# what E = 4 implies exactly (+6.6 %), E = 9 is +15.2 % where the table has +14.9 %, and E = 16 +25.8 % for its +26.4 %.
TABLE_3 = {
    "ive-9": (323.54 * 1.149, 0.005),
    "ive-16": (323.54 * 1.264, 0.006),
    "tdqkr-3": (344.98 * 1.00002, 0.005),
    "tdqkr-4": (344.98 * 1.00003, 0.005),
    "mcs-4": (344.98 * 1.00003, 0.005),
    "mcs-8": (344.98 * 1.00007, 0.005),
}

# From which row each is made, its switch, and what changes with it: the baseline is the row before in Table 2, that of
# its column in Table 3, PKM in Table 8.
HALF = {"knum", "top_m", "output", "project_bias"}  # about twice the rows, doubled top-m, a projection
SPLIT = {"knum", "top_m", "key_dim"}
CHANGES = {
    "rm-softmax": ("pkm", "score_function", set()),
    "half-vdim": ("rm-softmax", "value_dim", HALF),
    "share-query": ("half-vdim", "shared_query", set()),
    "split-skip": ("share-query", "insertions", SPLIT),
    "qk-norm": ("split-skip", "qk_norm", set()),
    "ive": ("qk-norm", "expansion", {"permutation"}),
    "tdqkr": ("ive", "rank", set()),
    "mcs": ("tdqkr", "num_cores", set()),
    "init": ("mcs", "init", set()),
    "value-lr-decay": ("init", "value_lr_ratio", set()),
    "query-conv": ("value-lr-decay", "conv_width", set()),
    "ive-9": ("qk-norm", "expansion", {"permutation"}),
    "ive-16": ("qk-norm", "expansion", {"permutation"}),
    "tdqkr-3": ("ive", "rank", {"key_dim"}),  # 3 does not divide 500
    "tdqkr-4": ("ive", "rank", set()),
    "mcs-4": ("tdqkr", "num_cores", set()),
    "mcs-8": ("tdqkr", "num_cores", set()),
    "only-rm-softmax": ("pkm", "score_function", set()),
    "only-half-vdim": ("pkm", "value_dim", HALF),
    "only-share-query": ("pkm", "shared_query", set()),
    "only-split": ("pkm", "insertions", SPLIT),
    "only-qk-norm": ("pkm", "qk_norm", set()),
    "only-ive": ("pkm", "expansion", {"permutation", "output", "project_bias"}),
    "only-tdqkr": ("pkm", "rank", set()),
    "only-tdqkr-mcs": ("pkm", "num_cores", {"rank"}),
    "only-value-lr-decay": ("pkm", "value_lr_ratio", set()),
}
TINY_FAMILIES = (
    "dense-tiny",
    "moe-tiny",
    "pkm-tiny",
    "ultramem-tiny",
    "memory-plus-tiny",
    "peer-tiny",
    "ultramem-v2-tiny",
)


@pytest.mark.parametrize("name", TABLE_6)
def test_table_6(name):
    params, flops, params_tolerance, flops_tolerance = TABLE_6[name]
    counts = count(preset(name))
    assert counts.total / 1e9 == pytest.approx(params, rel=params_tolerance)
    assert counts.flops_per_token / 1e9 == pytest.approx(flops, rel=flops_tolerance)


@pytest.mark.parametrize("row", TABLE_2)
def test_table_2(row):
    dense, sparse, flops = TABLE_2[row]
    counts = count(preset(f"ablation-{row}-151m"))
    assert counts.dense / 1e6 == pytest.approx(dense, rel=0.001)
    assert counts.sparse / 1e9 == pytest.approx(sparse, abs=0.0005)
    assert counts.flops_per_token / 1e6 == pytest.approx(flops, rel=0.005)


@pytest.mark.parametrize("row", TABLE_3)
def test_table_3(row):
    flops, tolerance = TABLE_3[row]
    assert count(preset(f"ablation-{row}-151m")).flops_per_token / 1e6 == pytest.approx(flops, rel=tolerance)


def _everything(name):
    """Every field of a preset by its own name; the memory's shadow none of the model's here."""
    model = asdict(preset(name))
    return {**model.pop("memory"), "insertions": model["insertions"], **preset_training(name)}


@pytest.mark.parametrize("size", ["151m", "tiny"])
@pytest.mark.parametrize("row", CHANGES)
def test_a_row_changes_its_switch_and_the_sizes_that_go_with_it(row, size):
    before, switch, sizes = CHANGES[row]
    old, new = _everything(f"ablation-{before}-{size}"), _everything(f"ablation-{row}-{size}")
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    assert switch in changed
    assert changed - {switch} <= sizes
    dense = {name: value for name, value in asdict(preset(f"ablation-{row}-{size}")).items() if name != "memory"}
    pkm = asdict(preset(f"ablation-pkm-{size}"))
    assert {name for name, value in dense.items() if pkm[name] != value} <= {"insertions"}


def test_every_row_of_the_tables_is_there():
    for size in ("151m", "tiny"):
        rows = {name.removeprefix("ablation-").removesuffix(f"-{size}") for name in _ablations(size)}
        assert rows == {"pkm", *CHANGES}


def _ablations(size):
    return [name for name in ultramem.presets() if name.startswith("ablation-") and name.endswith(f"-{size}")]


def test_tiny_families_are_equal_in_flops_and_sparse_ones_in_parameters():
    ours = count(preset("ultramem-tiny"))
    for name in TINY_FAMILIES:
        counts = count(preset(name))
        assert counts.flops_per_token == pytest.approx(ours.flops_per_token, rel=0.005), name
        if name != "dense-tiny":
            assert counts.total == pytest.approx(ours.total, rel=0.005), name
    assert count(preset("dense-tiny")).sparse == 0


def test_value_learning_rate_decays_from_its_row_on():
    for row in ("pkm", "half-vdim", "init"):
        assert dict(preset_training(f"ablation-{row}-tiny")) == {"value_lr_ratio": 1.0}
    for name in ("ablation-value-lr-decay-tiny", "ablation-query-conv-151m", "ultramem-tiny", "dense-tiny"):
        assert dict(preset_training(name)) == {}
    assert TrainConfig(**preset_training("ablation-pkm-tiny")).value_lr_ratio == 1.0
    assert TrainConfig().value_lr_ratio == 10.0


@pytest.mark.parametrize("name", ultramem.presets())
def test_presets_survive_json(name):
    assert from_dict(ModelConfig, to_dict(preset(name))) == preset(name)
