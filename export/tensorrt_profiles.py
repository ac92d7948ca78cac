"""The ranges of sizes that a TensorRT engine is built for: a profile for prefill and one for decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ultramem.config import ModelConfig
from ultramem.export.options import ExportOptions
from ultramem.export.signature import TensorSpec

OPT_PROMPT = 128  # tokens of the prompt that an engine is tuned for
MOST_BATCH = 8


class Range(NamedTuple):
    """Smallest, likeliest and largest value of a size."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Ranges of the free sizes: batch, new tokens of a prefill, cached tokens."""

    batch: Range
    seq: Range
    past: Range


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Smallest, likeliest and largest shape of every input."""

    name: str
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def parse_ranges(text: str) -> dict[str, Range]:
    """Read "batch=1:4:8,seq=1:128:512,past=0:256:1024", any of the three.

    Raises:
        ValueError: it is not that; the message names the part, its value and what is accepted.
    """
    found: dict[str, Range] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        words = value.split(":")
        if name not in ("batch", "seq", "past") or name in found:
            raise ValueError(f"sizes must name each of batch, seq and past at most once, got {part!r}")
        if len(words) != 3 or not all(word.isascii() and word.isdecimal() for word in words):
            raise ValueError(f"sizes must give min:opt:max of {name}, three numbers, got {value!r}")
        least, likely, most = (int(word) for word in words)
        if not (name == "past" or least >= 1) or not least <= likely <= most:
            floor = 0 if name == "past" else 1
            raise ValueError(f"sizes must have {floor} <= min <= opt <= max for {name}, got {value!r}")
        found[name] = Range(least, likely, most)
    return found


def sizes_of(options: ExportOptions, config: ModelConfig) -> Sizes:
    """The ranges that the options give, completed by what the model allows.

    Raises:
        ValueError: a range is given for a size that is fixed, or goes past the model's positions.
    """
    given = {} if options.sizes is None else parse_ranges(options.sizes)
    most = config.max_positions
    for name, fixed in (("batch", options.batch), ("seq", options.seq)):
        if name in given and fixed is not None:
            raise ValueError(f"sizes must not give {name}, which is fixed to {fixed}, got {options.sizes!r}")
    for name in ("seq", "past"):
        if name in given and given[name].max > most:
            raise ValueError(f"sizes must have {name} up to {most}, the model's positions, got {given[name].max}")
    batch = Range(1, 1, MOST_BATCH) if options.batch is None else Range(*(options.batch,) * 3)
    seq = Range(1, min(OPT_PROMPT, most), most) if options.seq is None else Range(*(options.seq,) * 3)
    past = Range(0, min(OPT_PROMPT, most), most)
    return Sizes(batch=given.get("batch", batch), seq=given.get("seq", seq), past=given.get("past", past))


def profiles(inputs: Sequence[TensorSpec], options: ExportOptions, sizes: Sizes) -> tuple[Profile, ...]:
    """Prefill, tuned for an empty cache, and decode, of one token; or the only one that fixed sizes leave."""
    prefill_past = Range(sizes.past.min, sizes.past.min, sizes.past.max)
    if options.seq is not None:
        name = "decode" if options.seq == 1 else "fixed"
        return (_profile(name, inputs, sizes.batch, sizes.seq, sizes.past),)
    return (
        _profile("prefill", inputs, sizes.batch, sizes.seq, prefill_past),
        _profile("decode", inputs, sizes.batch, Range(1, 1, 1), sizes.past),
    )


def _profile(name: str, inputs: Sequence[TensorSpec], batch: Range, seq: Range, past: Range) -> Profile:
    cases = [dict(zip(("batch", "seq", "past"), each, strict=True)) for each in zip(batch, seq, past, strict=True)]
    shapes = {}
    for spec in inputs:
        least, likely, most = (tuple(_value(size, case) for size in spec.shape) for case in cases)
        shapes[spec.name] = (least, likely, most)
    return Profile(name=name, shapes=shapes)


def _value(size: int | str, case: Mapping[str, int]) -> int:
    """Of a number, a name, or a sum of a name and a name or number."""
    if isinstance(size, int):
        return size
    return sum(int(word) if word.isdecimal() else case[word] for word in size.split(" + "))
