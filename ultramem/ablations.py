"""The paper's ablations (Tables 2, 3 and 8) as data: from PKM to UltraMem, one switch a row.

The sizes of Table 2 are decoded from its dense parameters and FLOPs. Two heads; keys of 2448 a side before the split
and 500 after it, which TDQKR cuts into r pieces; a projection with a bias per virtual block. The rows that change more
than their switch, as the paper says or its counts show: half Dv doubles m and about doubles the rows; the split gives
each of three layers a third of the rows, a fourth of the slots (36 of 48 in all) and keys of 500. Table 8 gives no
sizes: its rows take those that the same switch has in Table 2 where they fit a single layer of whole-width values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ultramem.config import MemoryConfig, ModelConfig
from ultramem.config.pkm import PKM_SWITCHES


class AblationRow(NamedTuple):
    """One row of a table."""

    name: str
    model: ModelConfig
    training: dict[str, Any]
    """Fields of TrainConfig that the row fixes."""
    before: str
    """The row that it changes by one switch; empty for the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationSizes:
    """What the rows of one model size are made with; the rows before the split say how wide one big layer is."""

    dense: ModelConfig
    """The dense part."""
    layer: str
    """Where the one layer stands, as an insertion."""
    knum: int
    half_knum: int
    """[Knum] with values of half the width."""
    top_m: int
    key_dim: int
    split_layers: str
    """Where the layers stand after the split, as insertions."""
    split_knum: int
    split_whole_knum: int
    """[Knum] after the split with values of the whole width (Table 8)."""
    split_top_m: int
    split_key_dim: int
    rank_3_key_dim: int
    """Key width for r = 3, the nearest to split_key_dim that 3 divides."""


def ablation_rows(sizes: AblationSizes) -> tuple[AblationRow, ...]:
    """The rows of Table 2 in order, then those of Table 3 that are not there, then Table 8's, each alone ("only-...").

    Names are the switches: "rm-softmax", "half-vdim", ... ; "ive-9" is Table 3's IVE with E = 9.
    """
    d = sizes.dense.hidden_size
    pkm = MemoryConfig(
        hidden_size=d,
        num_layers=sizes.dense.num_layers,
        value_dim=d,
        key_dim=sizes.key_dim,
        knum=sizes.knum,
        top_m=sizes.top_m,
        rank_layout="split",
        init="released",
        **PKM_SWITCHES,
    )
    project: dict[str, Any] = {"output": "project", "project_bias": True}
    half: dict[str, Any] = {"value_dim": d // 2, "knum": sizes.half_knum, "top_m": 2 * sizes.top_m, **project}
    split: dict[str, Any] = {
        "knum": sizes.split_knum,
        "top_m": sizes.split_top_m,
        "key_dim": sizes.split_key_dim,
    }
    ive: dict[str, Any] = {"expansion": 4, "permutation": "computed"}
    rows = _Rows(sizes, pkm)
    rows.add("rm-softmax", "pkm", score_function="none")
    rows.add("half-vdim", "rm-softmax", **half)
    rows.add("share-query", "half-vdim", shared_query=True)
    rows.add("split-skip", "share-query", sizes.split_layers, **split)
    rows.add("qk-norm", "split-skip", qk_norm="layer")
    rows.add("ive", "qk-norm", **ive)
    rows.add("tdqkr", "ive", rank=2)
    rows.add("mcs", "tdqkr", num_cores=2)
    rows.add("init", "mcs", init="calibrated")
    rows.add("value-lr-decay", "init", training={})
    rows.add("query-conv", "value-lr-decay", conv_width=4)
    for expansion in (9, 16):
        rows.add(f"ive-{expansion}", "qk-norm", **ive | {"expansion": expansion})
    rows.add("tdqkr-3", "ive", rank=3, key_dim=sizes.rank_3_key_dim)
    rows.add("tdqkr-4", "ive", rank=4)
    for cores in (4, 8):
        rows.add(f"mcs-{cores}", "tdqkr", num_cores=cores)
    rows.add("only-rm-softmax", "pkm", score_function="none")
    rows.add("only-half-vdim", "pkm", **half)
    rows.add("only-share-query", "pkm", shared_query=True)
    rows.add(
        "only-split",
        "pkm",
        sizes.split_layers,
        **split | {"knum": sizes.split_whole_knum, "top_m": sizes.split_top_m // 2 or 1},
    )
    rows.add("only-qk-norm", "pkm", qk_norm="layer")
    rows.add("only-ive", "pkm", **ive | project)
    rows.add("only-tdqkr", "pkm", rank=2)
    rows.add("only-tdqkr-mcs", "pkm", rank=2, num_cores=2)
    rows.add("only-value-lr-decay", "pkm", training={})
    return tuple(rows.made.values())


class _Rows:
    """Rows by name; each is made from an earlier one."""

    def __init__(self, sizes: AblationSizes, pkm: MemoryConfig) -> None:
        model = replace(sizes.dense, memory=pkm, insertions=sizes.layer)
        # Before "value-lr-decay" the values learn as fast as everything else.
        self.made = {"pkm": AblationRow("pkm", model, {"value_lr_ratio": 1.0}, "")}

    def add(
        self, name: str, before: str, insertions: str = "", *, training: dict[str, Any] | None = None, **changes: Any
    ) -> None:
        row = self.made[before]
        assert row.model.memory is not None
        model = replace(
            row.model,
            memory=replace(row.model.memory, **changes),
            insertions=insertions or row.model.insertions,
        )
        self.made[name] = AblationRow(name, model, row.training if training is None else training, before)
