"""Where a table's rows go: on every rank, cut by rows, or cut by columns; with the reasons in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ultramem.runtime.plan.exchange import Collective, LookupShape, Placement, Pooling, Volume, Wire
from ultramem.runtime.plan.volumes import added_up, columns, replicate, rows_at_home, rows_at_owner
from ultramem.runtime.profile.units import bytes_text, number_text, share_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to place a table."""

    volume: Volume
    """Of one lookup; where every rank has the table, what adds up a step's gradient."""
    copies: tuple[Collective, ...]
    """What adds up a step's gradient of a table over its copies; none where there is one copy."""
    step_bytes: int
    """That a rank sends for one table in a step, which the choice compares."""
    refused: str | None
    """Why it cannot be; None if it can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The placement that sends the fewest bytes of those that can be."""

    placement: Placement
    pooling: Pooling | None
    """Where rows are pooled in "rows"; None else."""
    volume: Volume
    """Of one lookup; where every rank has the table, what adds up a step's gradient."""
    reasons: tuple[str, ...]
    """Sentences for people, the conclusion last."""
    candidates: tuple[Candidate, ...]
    """All that were weighed."""


def choose_placement(
    shape: LookupShape,
    ranks: int,
    *,
    wire: Wire | None = None,
    replica_bytes: int,
    free_bytes: int | None = None,
    distinct_rows: int | None = None,
    copies: int = 1,
    touched_rows: int | None = None,
    group_touched_rows: int | None = None,
    lookups: int = 1,
    training: bool = True,
    pool: Pooling | None = None,
    ruled_out: Mapping[Placement, str] | None = None,
) -> Choice:
    """The placement of a table over `ranks` that sends the fewest bytes and fits.

    Ties go to the one that is named first: replicate, columns, rows pooled at home, rows pooled at the owner.

    Args:
        shape: of a lookup on one rank.
        ranks: that share a copy of the table if it is cut, one lookup each.
        wire: bytes of what is sent; None: 2 bytes a number.
        replica_bytes: memory that all tables of the model take on a rank that has them whole: rows, gradients, state.
        free_bytes: memory that a rank has for them; None: nobody knows, so that tables of several ranks are sharded.
        distinct_rows: different rows that a rank's lookup reads, where indices are deduplicated; None: they are not.
        copies: of a cut table; all ranks are so many times `ranks`.
        touched_rows: different rows that a step of one rank touches, where gradients are of touched rows; None: they
            are dense.
        group_touched_rows: the same of the ranks that share a copy.
        lookups: of a table in a step: layers that share it times micro-batches. Each exchanges; replicas reduce once.
        training: backward passes count; else the forward alone.
        pool: where rows are pooled, if that is settled; None: where that sends less.
        ruled_out: placements that cannot be for reasons of the caller's, each as a sentence.

    Raises:
        ValueError: a number is out of range.
    """
    if replica_bytes < 0 or (free_bytes is not None and free_bytes < 0):
        raise ValueError(f"replica_bytes and free_bytes must be at least 0, got {replica_bytes} and {free_bytes}")
    wire = wire or Wire()
    refused: dict[Placement, str | None] = {
        "replicate": _why_not_replicate(ranks * copies, replica_bytes, free_bytes),
        "columns": _why_not_columns(shape, ranks),
        "rows": _why_not_rows(shape, ranks),
        **(ruled_out or {}),
    }
    candidates = []
    for volume in (
        replicate(shape, ranks * copies, wire, distinct_rows=touched_rows),
        columns(shape, ranks, wire),
        rows_at_home(shape, ranks, wire, distinct_rows=distinct_rows),
        rows_at_owner(shape, ranks, wire, distinct_rows=distinct_rows),
    ):
        if None not in (pool, volume.pooling) and pool != volume.pooling:
            continue
        added = part_added_up(shape, volume.placement, ranks, copies, wire, group_touched_rows) if training else ()
        sent = volume.total_bytes if training else volume.forward_bytes
        times = 1 if volume.placement == "replicate" else lookups
        step_bytes = times * sent + sum(each.sent_bytes for each in added)
        candidates.append(
            Candidate(volume=volume, copies=added, step_bytes=step_bytes, refused=refused[volume.placement])
        )
    possible = [each for each in candidates if each.refused is None]
    if not possible:
        raise ValueError(
            f"ranks must be so few that each has some of the {shape.table_rows} rows, where a table does not fit one "
            f"rank whole, got {ranks}"
        )
    best = min(possible, key=lambda each: each.step_bytes)
    reasons = [_sentence(each, training) for each in candidates]
    return Choice(
        placement=best.volume.placement,
        pooling=best.volume.pooling,
        volume=best.volume,
        reasons=(*reasons, *_conclusion(best, possible, ranks, replica_bytes, free_bytes)),
        candidates=tuple(candidates),
    )


def part_added_up(
    shape: LookupShape, placement: Placement, ranks: int, copies: int, wire: Wire, touched_rows: int | None
) -> tuple[Collective, ...]:
    """What a rank sends for the gradient of its part of a table, which as many others have as there are copies.

    Args:
        shape: of a lookup.
        placement: of the table.
        ranks: that share a copy.
        copies: of the table.
        wire: bytes of what is sent.
        touched_rows: that the ranks of a copy touch in a step; None: gradients are dense.
    """
    if placement == "replicate":
        return ()
    by_rows = placement == "rows"
    cut = 1 if by_rows else ranks
    widths = [-(-width // cut) for width in (shape.value_dim, shape.expert_dim) if width]
    rows = -(-shape.table_rows // ranks) if by_rows else shape.table_rows
    if touched_rows is not None and by_rows:
        touched_rows = -(-touched_rows // ranks)
    return added_up(rows, widths, copies, wire, touched_rows=touched_rows)


def _why_not_columns(shape: LookupShape, ranks: int) -> str | None:
    for name in ("value_dim", "expert_dim"):
        if getattr(shape, name) % ranks:
            return f"Columns are not possible: {name} {getattr(shape, name)} is no multiple of {ranks} ranks."
    return None


def _why_not_replicate(ranks: int, replica_bytes: int, free_bytes: int | None) -> str | None:
    if ranks == 1:
        return None
    if free_bytes is None:
        return (
            f"Replicating is not considered: it takes {bytes_text(replica_bytes)} on each rank, and nobody says what "
            f"a rank has."
        )
    if replica_bytes > free_bytes:
        return (
            f"Replicating is not possible: it takes {bytes_text(replica_bytes)} on each rank, which has "
            f"{bytes_text(free_bytes)} for tables."
        )
    return None


def _why_not_rows(shape: LookupShape, ranks: int) -> str | None:
    if ranks > 1 and -(-shape.table_rows // ranks) * (ranks - 1) >= shape.table_rows:
        return (
            f"Rows are not possible: {shape.table_rows} rows are too few for {ranks} ranks to have some of them each."
        )
    return None


def _sentence(candidate: Candidate, training: bool) -> str:
    """What a candidate sends, or why it cannot be."""
    if candidate.refused is not None:
        return candidate.refused
    volume = candidate.volume
    phases = ("forward", "backward") if training else ("forward",)
    counted = [each for each in (*volume.collectives, *candidate.copies) if each.phase in phases]
    if not counted:
        return f"{volume.label.capitalize()}: nothing is sent."
    largest = max(counted, key=lambda each: each.sent_bytes)
    share = share_text(largest.sent_bytes / sum(each.sent_bytes for each in counted))
    return (
        f"{volume.label.capitalize()}: each rank sends {bytes_text(candidate.step_bytes)} a step and table, "
        f"{share} of it {largest.payload}."
    )


def _conclusion(
    best: Candidate, possible: list[Candidate], ranks: int, replica_bytes: int, free_bytes: int | None
) -> list[str]:
    said = f"So: {best.volume.label}"
    others = [each for each in possible if each.volume.placement != best.volume.placement]
    if others and best.step_bytes:
        second = min(others, key=lambda each: each.step_bytes)
        said += f"; {second.volume.label} would send {number_text(second.step_bytes / best.step_bytes)} times as much"
    sentences = [f"{said}."]
    shard_bytes = -(-replica_bytes // ranks)
    if best.volume.placement != "replicate" and free_bytes is not None and shard_bytes > free_bytes:
        sentences.append(
            f"Even so a rank's part takes {bytes_text(shard_bytes)} of {bytes_text(free_bytes)}: more ranks are "
            f"needed, or a table optimiser with less state."
        )
    return sentences
