"""Validation losses of the UltraMem paper (arXiv 2411.12364), in nats per token of a vocabulary of 50,432."""

from __future__ import annotations

from typing import NamedTuple

TABLE_1: dict[str, dict[str, float]] = {
    "151M": {"dense-tiny": 2.96, "pkm-tiny": 2.76, "moe-tiny": 2.63, "ultramem-tiny": 2.67},
    "680M": {"dense-tiny": 2.64, "pkm-tiny": 2.46, "moe-tiny": 2.39, "ultramem-tiny": 2.37},
    "1.6B": {"dense-tiny": 2.49, "pkm-tiny": 2.34, "moe-tiny": 2.30, "ultramem-tiny": 2.24},
}
"""By the size of the dense model, then by our model of that family."""


class Switch(NamedTuple):
    """What turning a switch on did to the paper's validation loss."""

    table_2: float
    """Added to those before it in the table."""
    table_8: float
    """Added to PKM alone; sizes as in Table 2, so without the skip for the split."""


SWITCHES: dict[str, Switch] = {
    "no-half-vdim": Switch(-0.022, -0.020),
    "no-split": Switch(-0.015, -0.005),
    "no-ive": Switch(-0.017, -0.023),
    "no-tdqkr-mcs": Switch(round(-0.008 - 0.003, 3), -0.009),
    "no-mcs": Switch(-0.003, round(-0.009 + 0.007, 3)),
    "no-value-lr": Switch(-0.022, -0.007),
}
"""By our ablation, which takes the switch away again. The paper has no two-tailed candidates."""


def expected_change(ablation: str) -> float | None:
    """Sign and size of what the paper's Table 2 lets expect of an ablation: taking a gain away is a loss."""
    return -SWITCHES[ablation].table_2 if ablation in SWITCHES else None
