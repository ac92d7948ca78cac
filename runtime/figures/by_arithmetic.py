"""The points of each figure by arithmetic, and the paper's statements against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ultramem.counts import count
from ultramem.presets import preset
from ultramem.runtime.figures.devices import Roofs
from ultramem.runtime.figures.expected import decode_costs, resident_bytes, roofline_us, sparse_bytes
from ultramem.runtime.figures.paper import (
    BATCHES,
    CACHED_TOKENS,
    FIGURE_6_BATCH,
    FIGURE_6_RATIOS,
    FIGURE_6_SIZE,
    PRESETS,
    PaperModel,
    paper_models,
    sparser,
)
from ultramem.runtime.figures.schema import ArithmeticPoint, Claim

TOLERANCE = 0.2
"""A number of the paper's holds if ours is within this share of it: its figures are read from prose."""
ALIKE = 0.9
"""Memory access is "aligned" from this share of the other on."""


def figure_points(figure: int, roofs: Roofs) -> list[ArithmeticPoint]:
    """Every point of Figure 1, 6 or 7 on a device."""
    if figure == 6:
        models = [model for model in paper_models((FIGURE_6_SIZE,)) if model.family in ("moe", "ultramem")]
        grown = [sparser(model, ratio) for model in models for ratio in FIGURE_6_RATIOS]
        return [point_of(model, FIGURE_6_BATCH, cached, roofs) for model in grown for cached in CACHED_TOKENS]
    models = paper_models(("1.6b",)) if figure == 1 else paper_models()
    return [
        point_of(model, batch, cached, roofs)
        for model in models
        for cached in CACHED_TOKENS
        for batch in BATCHES[figure]
    ]


def point_of(model: PaperModel, batch: int, cached_tokens: int, roofs: Roofs) -> ArithmeticPoint:
    """One decode step of one model on a device."""
    config, size = model.config, roofs.element_bytes
    costs = decode_costs(config, batch=batch, cached_tokens=cached_tokens, element_bytes=size)
    counts = count(config)
    resident = resident_bytes(config, batch=batch, cached_tokens=cached_tokens, element_bytes=size)
    return ArithmeticPoint(
        family=model.family,
        size=model.size,
        model=model.name,
        batch=batch,
        cached_tokens=cached_tokens,
        sparse_ratio=counts.sparse / count(preset(PRESETS["dense", model.size])).total,
        parameters=counts.total,
        flops=sum(cost.flops for cost in costs),
        weight_bytes=sum(cost.weight_bytes for cost in costs),
        row_bytes=sum(cost.row_bytes for cost in costs),
        cache_bytes=sum(cost.cache_bytes for cost in costs),
        activation_bytes=sum(cost.activation_bytes for cost in costs),
        total_bytes=sum(cost.total_bytes for cost in costs),
        sparse_bytes=sparse_bytes(costs, config, element_bytes=size),
        roofline_us=roofline_us(costs, roofs),
        resident_bytes=resident,
        fits=None if roofs.memory_bytes is None else resident <= roofs.memory_bytes,
    )


def figure_claims(figure: int, points: Sequence[ArithmeticPoint]) -> list[Claim]:
    """What the paper says about the figure, each against these points."""
    return {1: _claims_1, 6: _claims_6, 7: _claims_7}[figure](points)


def _claim(paper: str, quantity: str, value: float | None, low: float, high: float | None) -> Claim:
    """A statement that holds if `value` lies between `low` and `high` (None: no upper bound)."""
    agrees = value is not None and low <= value and (high is None or value <= high)
    return Claim(paper=paper, quantity=quantity, value=value, low=low, high=high, agrees=agrees)


def _about(paper: str, quantity: str, value: float, stated: float) -> Claim:
    return _claim(paper, quantity, value, (1 - TOLERANCE) * stated, (1 + TOLERANCE) * stated)


def _ratios(
    points: Sequence[ArithmeticPoint], over: str, under: str, cached: int, of: Callable[[ArithmeticPoint], float]
) -> dict[int, float]:
    """Ratio of one family to another by batch, at 1.6B."""

    def of_family(family: str) -> dict[int, float]:
        return {
            point.batch: of(point)
            for point in points
            if (point.family, point.size, point.cached_tokens) == (family, "1.6b", cached)
        }

    above, below = of_family(over), of_family(under)
    return {batch: above[batch] / below[batch] for batch in above}


def _time(point: ArithmeticPoint) -> float:
    return point.roofline_us


def _with_cache(cached: int) -> str:
    return f"with {cached} cached tokens" if cached else "without a cache"


def _claims_1(points: Sequence[ArithmeticPoint]) -> list[Claim]:
    claims = []
    for cached in CACHED_TOKENS:
        over_dense = _ratios(points, "moe", "dense", cached, _time)
        over_memory = _ratios(points, "moe", "ultramem", cached, _time)
        memory_over_dense = _ratios(points, "ultramem", "dense", cached, _time)
        up_to_64 = max(ratio for batch, ratio in memory_over_dense.items() if batch <= 64)
        where = _with_cache(cached)
        claims += [
            _about(
                "MoE runs 2 to 6 times slower than the dense model, by batch",
                f"largest ratio of MoE's time to the dense model's, batch 1 to 512, {where}",
                max(over_dense.values()), 6,
            ),
            _about(
                "UltraMem is up to 6 times faster than MoE",
                f"largest ratio of MoE's time to UltraMem's, batch 1 to 512, {where}",
                max(over_memory.values()), 6,
            ),
            _claim(
                "the largest speedup over MoE is at batch 64",
                f"batch of the largest ratio of MoE's time to UltraMem's, {where}",
                max(over_memory, key=lambda batch: over_memory[batch]), 64, 64,
            ),
            _claim(
                "UltraMem's speed is almost that of the dense model",
                f"largest ratio of UltraMem's time to the dense model's, batch 1 to 64, {where}",
                up_to_64, 0, 1 + TOLERANCE,
            ),
        ]  # fmt: skip
    return claims


def _claims_6(points: Sequence[ArithmeticPoint]) -> list[Claim]:
    claims = []
    for cached in CACHED_TOKENS:
        growth = {}
        for family in ("ultramem", "moe"):
            chosen = [point for point in points if (point.family, point.cached_tokens) == (family, cached)]
            chosen.sort(key=lambda point: point.sparse_ratio)
            growth[family] = chosen[-1].roofline_us / chosen[0].roofline_us
        times = f"{FIGURE_6_RATIOS[-1] / FIGURE_6_RATIOS[0]:g} times the sparse parameters"
        where = f"batch {FIGURE_6_BATCH}, {_with_cache(cached)}"
        claims += [
            _claim(
                "UltraMem's inference time remains nearly constant as sparse parameters increase",
                f"growth of UltraMem's time over {times}, {where}",
                growth["ultramem"], 0, 1 + TOLERANCE,
            ),
            _claim(
                "MoE's inference time increases significantly",
                f"growth of MoE's time over {times}, {where}",
                growth["moe"], 1.5, None,
            ),
        ]  # fmt: skip
    return claims


def _claims_7(points: Sequence[ArithmeticPoint]) -> list[Claim]:
    def sparse(point: ArithmeticPoint) -> float:
        return point.sparse_bytes

    shares = _ratios(points, "ultramem", "moe", 0, sparse)
    aligned = [batch for batch, share in shares.items() if share >= ALIKE]
    last = max(shares)
    claims = [
        _claim(
            "UltraMem's memory access aligns with MoE's only at batch 131,072",
            f"smallest batch at which UltraMem's rows are {ALIKE:g} of the bytes of MoE's experts",
            min(aligned, default=None), last, last,
        )
    ]  # fmt: skip
    for cached in CACHED_TOKENS:
        claims.append(
            _claim(
                "UltraMem continues to have an advantage in inference speed there",
                f"ratio of MoE's time to UltraMem's at batch {last:,}, {_with_cache(cached)}",
                _ratios(points, "moe", "ultramem", cached, _time)[last], 1, None,
            )
        )  # fmt: skip
    return claims
