"""A profile in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ultramem.runtime.profile.arithmetic import STAGES
from ultramem.runtime.profile.schema import Profile, StageTimes
from ultramem.runtime.profile.units import bytes_text, number_text, scaled_text, share_text, time_text


def print_profile(profile: Profile, console: Console | None = None) -> None:
    """Print latency and stage times as tables."""
    console = console or Console()
    machine, settings = profile.machine, profile.settings
    console.print(
        f"[bold]{profile.model.name}[/bold], {scaled_text(profile.model.parameters, '').strip()} parameters, "
        f"prompt of {settings.prompt_tokens} tokens, on {machine.device} ({machine.threads} threads, "
        f"{bytes_text(machine.bytes_per_second)}/s, {scaled_text(machine.gemm_flops_per_second, 'FLOP')}/s)"
    )
    console.print(latency_table(profile))
    console.print(stage_table(profile))


def latency_table(profile: Profile) -> Table:
    """Percentiles and shares of the roofs, a row for each phase, batch and engine."""
    table = Table(title="Latency per forward", title_justify="left")
    for heading in ("phase", "batch", "engine"):
        table.add_column(heading, justify="right" if heading == "batch" else "left")
    for heading in ("p50", "p90", "p99", "tokens/s", "of bandwidth", "of GEMM rate"):
        table.add_column(heading, justify="right")
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
            number_text(row.tokens_per_second),
            share_text(row.bandwidth_share),
            share_text(row.compute_share),
        )
    return table


def stage_table(profile: Profile) -> Table:
    """Time by stage, a column for each stage; what compilers fused over several stages is one column."""
    present = [stage for stage in STAGES if any((stage,) == row.stages for t in profile.stages for row in t.rows)]
    table = Table(title="Time by stage (instrumented forward)", title_justify="left")
    for heading in ("phase", "batch", "engine"):
        table.add_column(heading, justify="right" if heading == "batch" else "left")
    for heading in (*present, "fused over stages", "outside", "sum"):
        table.add_column(heading, justify="right")
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
            time_text(times.wall_us),
        )
    return table


def fused_time_us(times: StageTimes) -> float:
    """Time of kernels that compute several stages."""
    return sum(row.time_us for row in times.rows if len(row.stages) > 1)
