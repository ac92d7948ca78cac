"""Latency of engines side by side: agreement first, then interleaved rounds and percentiles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ultramem.graph.gathered_table import in_precision
from ultramem.graph.transformer import Transformer
from ultramem.machine import synchronize
from ultramem.runtime.profile.in_step import agreed
from ultramem.runtime.profile.schema import DECODE, PREFILL

TOLERANCE_FACTOR = 4.0
MIN_SAMPLES = 5
WARM_UP = 3


class Engine(Protocol):
    """What runs a model: see `ultramem.runtime.engine`."""

    @property
    def name(self) -> str: ...

    def prefill(self, input_ids_BS: Tensor, attention_mask_BS: Tensor | None = None) -> tuple[Tensor, Any]: ...

    def decode(self, input_ids_B1: Tensor, cache: Any, attention_mask: Tensor | None = None) -> tuple[Tensor, Any]: ...


class WrongLogitsError(ValueError):
    """An engine's logits are not eager's: its times would be those of another computation."""


class Inputs(NamedTuple):
    """Tokens of one batch size: a prompt and the token after it."""

    prompt_BS: Tensor
    next_B1: Tensor


class Agreement(NamedTuple):
    """Largest difference of an engine's logits from eager's, and what is accepted."""

    max_abs_difference: float
    tolerance: float


@dataclass(slots=True)
class Cell:
    """One engine, batch and phase: the call to time and, per round, its samples."""

    engine: str
    batch: int
    phase: str
    call: Callable[[], object]
    round_us: list[list[float]] = field(default_factory=list)

    @property
    def samples_us(self) -> list[float]:
        return [sample for samples in self.round_us for sample in samples]


def draw_inputs(vocab_size: int, *, batch: int, prompt_tokens: int, seed: int) -> Inputs:
    """Random tokens on the CPU, where every engine takes them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (batch, prompt_tokens + 1), generator=generator)
    return Inputs(tokens[:, :-1].contiguous(), tokens[:, -1:].contiguous())


def percentile(samples: Sequence[float], share: float) -> float:
    """The `share` quantile, linear between the two nearest samples."""
    if not samples or not 0 <= share <= 1:
        raise ValueError(f"percentile needs samples and a share in [0, 1], got {len(samples)} samples, share {share}")
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@torch.no_grad()
def check_agreement(
    model: Transformer, engines: Sequence[Engine], draws: Sequence[Sequence[Inputs]]
) -> dict[str, Agreement]:
    """Compare every engine with eager, and eager with float64.

    A draw is a list of inputs, one for each batch size. The first draw decides; where an engine fails it, the others
    must all pass: two slots with nearly equal scores may change places between two correct engines, once.

    Raises:
        WrongLogitsError: an engine's logits differ from eager's by more than 4 x eager's own error against float64.
    """
    exact = in_precision(model, torch.float64)
    first, *others = draws
    agreements = {}
    for engine in engines:
        agreement = _compare(model, exact, engine, first)
        if agreement.max_abs_difference > agreement.tolerance:
            retries = [_compare(model, exact, engine, draw) for draw in others]
            if not retries or any(not retry.max_abs_difference <= retry.tolerance for retry in retries):
                raise WrongLogitsError(
                    f"engine {engine.name!r} disagrees with eager: a logit differs by "
                    f"{agreement.max_abs_difference:.3g}, accepted {agreement.tolerance:.3g} "
                    f"({TOLERANCE_FACTOR:g} x eager's error against float64); nothing is reported"
                )
            agreement = max(retries, key=lambda retry: retry.max_abs_difference)
        agreements[engine.name] = agreement
    return agreements


def _compare(model: nn.Module, exact: nn.Module, engine: Engine, draw: Sequence[Inputs]) -> Agreement:
    difference = tolerance = 0.0
    for inputs in draw:
        expected = _eager_logits(model, inputs)
        reference = _eager_logits(exact, inputs)
        logits, cache = engine.prefill(inputs.prompt_BS)
        next_logits, _ = engine.decode(inputs.next_B1, cache)
        # An engine may return the last position of a prefill alone.
        found = torch.cat([logits, next_logits], dim=1).cpu().double()
        expected, reference = expected[:, -found.shape[1] :].double(), reference[:, -found.shape[1] :]
        # max() of a NaN compares as "not larger": ask for the agreement, not for the difference.
        largest = (found - expected).abs().max().item()
        difference = math.inf if math.isnan(largest) else max(difference, largest)
        tolerance = max(tolerance, TOLERANCE_FACTOR * (expected - reference).abs().max().item())
    return Agreement(difference, tolerance)


def _eager_logits(model: nn.Module, inputs: Inputs) -> Tensor:
    device = next(model.parameters()).device
    first = model(inputs.prompt_BS.to(device))
    return torch.cat([first.logits, model(inputs.next_B1.to(device), cache=first.cache).logits], dim=1).cpu()


def make_cells(engine: Engine, batch: int, inputs: Inputs) -> list[Cell]:
    """Prefill of the prompt, and the decode step after it, always from the same cache."""
    _, cache = engine.prefill(inputs.prompt_BS)
    return [
        Cell(engine.name, batch, PREFILL, lambda: engine.prefill(inputs.prompt_BS)),
        Cell(engine.name, batch, DECODE, lambda: engine.decode(inputs.next_B1, cache)),
    ]


@torch.no_grad()
def measure_cells(
    cells: Sequence[Cell], *, rounds: int, seconds_per_cell: float, max_samples: int, device: torch.device
) -> None:
    """Fill `round_us` of cells of one batch and phase, engine after engine in each round (A B A B)."""
    for cell in cells:
        for _ in range(WARM_UP):
            cell.call()
    per_round = max(1, -(-max_samples // rounds))
    at_least = max(1, -(-MIN_SAMPLES // rounds))
    for _ in range(rounds):
        for cell in cells:
            samples: list[float] = []
            end = time.perf_counter() + seconds_per_cell / rounds
            cell.call()  # what the engine before it left in the caches is not this engine's
            while agreed(len(samples) < at_least or (len(samples) < per_round and time.perf_counter() < end)):
                samples.append(time_us(cell.call, device))
            cell.round_us.append(samples)


def time_us(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock microseconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter_ns()
    call()
    synchronize(device)
    return (time.perf_counter_ns() - start) / 1e3
