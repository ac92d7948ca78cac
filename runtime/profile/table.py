"""A profile in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ultramem.runtime.profile.arithmetic import ALL_STAGES
from ultramem.runtime.profile.schema import DECODE, Profile, StageTimes
from ultramem.runtime.profile.units import bytes_text, number_text, scaled_text, share_text, time_text

FILE_WIDTH = 200
SHOWN_NODES = 8
"""Nodes an engine in the terminal; profile.json and report.html have them all."""


def print_profile(profile: Profile, console: Console | None = None) -> None:
    """Print engines, requests, latency, stages and the longest nodes as tables."""
    console = console or wide_console()
    machine, settings = profile.machine, profile.settings
    console.print(
        f"[bold]{profile.model.name}[/bold], {scaled_text(profile.model.parameters, '').strip()} parameters, "
        f"prompt of {settings.prompt_tokens} tokens, on {machine.device} ({machine.threads} threads, "
        f"{bytes_text(machine.bytes_per_second)}/s, {scaled_text(machine.gemm_flops_per_second, 'FLOP')}/s)"
    )
    console.print(engine_table(profile))
    console.print(request_table(profile))
    console.print(latency_table(profile))
    console.print(stage_table(profile))
    console.print(node_table(profile))
    if profile.row_use:
        console.print(row_table(profile))


def wide_console() -> Console:
    """The terminal as it is; a file or pipe gets lines that are wide enough for every table."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def engine_table(profile: Profile) -> Table:
    """What comes before the first token, and parity."""
    table = _table(
        "Engines", ("engine",), ("export", "open", "compile, warm-up", "memory", "graphs", "cached", "breaks")
    )
    for heading in ("largest difference", "accepted"):
        table.add_column(heading, justify="right")
    for row in profile.engines:
        table.add_row(
            row.name,
            time_text(1e6 * row.export_seconds) if row.export_seconds else "-",
            time_text(1e6 * row.open_seconds),
            time_text(1e6 * row.warm_up_seconds),
            _bytes_or_dash(row.memory_bytes),
            str(row.graphs),
            str(row.cached_graphs),
            str(row.graph_breaks),
            f"{row.max_abs_difference:.2g}",
            f"{row.tolerance:.2g}",
        )
    return table


def request_table(profile: Profile) -> Table:
    """First token, tokens after it, and what a request costs besides time."""
    title = (
        f"Requests: {profile.settings.prompt_tokens} tokens in, {profile.settings.new_tokens} out, greedy; "
        "gaps lie between one token and the next"
    )
    table = _table(
        title,
        ("batch", "engine"),
        (
            "first token", "per token", "gap p50", "gap p90", "gap p99", "tokens/s", "launches", "recompiles",
            "memory", "faults", "from disk", "largest difference",
        ),
    )  # fmt: skip
    before = None
    for row in profile.requests:
        if before not in (None, row.batch):
            table.add_section()
        before = row.batch
        table.add_row(
            str(row.batch),
            row.engine,
            *(time_text(each) for each in (row.ttft_us, row.tpot_us, row.gap_p50_us, row.gap_p90_us, row.gap_p99_us)),
            number_text(row.tokens_per_second),
            "-" if row.launches_per_step is None else str(row.launches_per_step),
            str(row.recompiles),
            _bytes_or_dash(row.memory_bytes),
            f"{row.minor_faults:,}",
            f"{row.major_faults:,}",
            f"{row.max_abs_difference:.2g}",
        )
    return table


def latency_table(profile: Profile) -> Table:
    """Percentiles and shares of the roofs, a row for each phase, batch and engine."""
    table = _table(
        "Latency per forward",
        ("phase", "batch", "engine"),
        ("p50", "p90", "p99", "p50 of each round", "tokens/s", "of bandwidth", "of GEMM rate", "largest difference"),
    )
    before = None
    for row in profile.latency:
        if before not in (None, (row.phase, row.batch)):
            table.add_section()
        before = (row.phase, row.batch)
        table.add_row(
            row.phase,
            str(row.batch),
            row.engine,
            time_text(row.p50_us),
            time_text(row.p90_us),
            time_text(row.p99_us),
            f"{time_text(row.round_p50_low_us)} - {time_text(row.round_p50_high_us)}",
            number_text(row.tokens_per_second),
            share_text(row.bandwidth_share),
            share_text(row.compute_share),
            f"{row.max_abs_difference:.2g}",
        )
    return table


def stage_table(profile: Profile) -> Table:
    """Time by stage, a column for each stage; what compilers fused over several stages is one column."""
    present = [stage for stage in ALL_STAGES if any((stage,) == row.stages for t in profile.stages for row in t.rows)]
    table = _table(
        "Time by stage (instrumented forwards, what the instruments cost taken off; plain: forwards without them)",
        ("phase", "batch", "engine"),
        (*present, "fused over stages", "outside", "sum", "plain", "sum / plain", "of each turn", "taken off"),
    )
    for times in profile.stages:
        alone = {row.stages[0]: row.time_us for row in times.rows if len(row.stages) == 1}
        cells = [time_text(alone[stage]) if stage in alone else "-" for stage in present]
        fused_us = fused_time_us(times)
        table.add_row(
            times.phase,
            str(times.batch),
            times.engine,
            *cells,
            time_text(fused_us) if fused_us else "-",
            time_text(times.unattributed_us) if times.rows else "not separable",
            time_text(times.sum_us),
            time_text(times.plain_us),
            f"{times.sum_ratio:.2f}" if times.rows else "-",
            f"{min(times.turn_sum_ratios):.2f} - {max(times.turn_sum_ratios):.2f}" if times.turn_sum_ratios else "-",
            time_text(times.instrument_us) if times.rows else "-",
        )
    return table


def node_table(profile: Profile) -> Table:
    """The longest nodes of each engine's decode step at the smallest batch."""
    batch = min(profile.settings.batches)
    table = _table(
        f"Longest nodes of a decode step, batch {batch}",
        ("engine", "module", "node"),
        ("calls", "p50", "p90", "p99", "FLOPs", "bytes", "of bandwidth", "of GEMM rate"),
    )
    for times in profile.stages:
        if (times.phase, times.batch) != (DECODE, batch):
            continue
        for row in sorted(times.nodes, key=lambda row: -row.p50_us)[:SHOWN_NODES]:
            table.add_row(
                times.engine,
                modules_text(row.modules),
                row.kind if row.kind != "module" else "module, outside its operators",
                str(row.calls),
                time_text(row.p50_us),
                time_text(row.p90_us),
                time_text(row.p99_us),
                "-" if row.flops is None else scaled_text(row.flops, "FLOP"),
                _bytes_or_dash(row.bytes),
                "-" if row.bandwidth_share is None else share_text(row.bandwidth_share),
                "-" if row.compute_share is None else share_text(row.compute_share),
            )
        table.add_section()
    return table


def row_table(profile: Profile) -> Table:
    """Rows that a forward reads from the value tables."""
    table = _table(
        "Rows of value tables that a forward reads", ("phase", "batch", "table"), ("reads", "different rows", "of")
    )
    for row in profile.row_use:
        table.add_row(
            row.phase, str(row.batch), row.table, f"{row.reads:,}", f"{row.rows_touched:,}", f"{row.table_rows:,}"
        )
    return table


def modules_text(modules: Sequence[str]) -> str:
    """ "blocks.0.attention", or the first of several and how many more."""
    if not modules:
        return "not known"
    return modules[0] if len(modules) == 1 else f"{modules[0]} and {len(modules) - 1} more"


def fused_time_us(times: StageTimes) -> float:
    """Time of kernels that compute several stages."""
    return sum(row.time_us for row in times.rows if len(row.stages) > 1)


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in names:
        table.add_column(heading, justify="right" if heading == "batch" else "left")
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def _bytes_or_dash(size: int | None) -> str:
    return "-" if size is None else bytes_text(size)
