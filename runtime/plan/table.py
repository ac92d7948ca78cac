"""A plan in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ultramem.runtime.plan.memory import num_tables, require_memory
from ultramem.runtime.plan.plan import Plan
from ultramem.runtime.profile.table import wide_console
from ultramem.runtime.profile.units import bytes_text, share_text, time_text


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print placements, what the chosen one sends, takes and lasts, the reasons, and advice."""
    console = console or wide_console()
    options, memory = plan.options, require_memory(plan.config)
    tables = num_tables(plan.config)
    console.print(
        f"[bold]{plan.name}[/bold] on {options.ranks} x {plan.device.label}, {options.ranks_per_node} to a node: "
        f"{tables} {'tables' if tables > 1 else 'table'} of {memory.table_rows:,} rows of {memory.value_dim},\n"
        f"{options.tokens_per_rank:,} tokens a rank, {options.dtype}, {options.table_optimizer} on "
        f"{options.table_dtype} tables" + (f", {options.table_copies} copies" if options.table_copies > 1 else ""),
        highlight=False,
    )
    console.print(placement_table(plan))
    for sentence in (*plan.choice.reasons, *plan.advice):
        console.print(sentence, highlight=False, soft_wrap=True)
    if plan.chosen.volume.placement != "replicate":
        console.print(f"\nWhat a rank sends in a lookup: {plan.chosen.volume.label}", highlight=False)
        console.print(collective_table(plan))
    console.print("\nMemory of a rank")
    console.print(memory_table(plan))
    console.print("\nA step")
    console.print(time_table(plan))
    console.print(
        f"Times are floors: {plan.device.source}; {plan.device.links.source}.",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def placement_table(plan: Plan) -> Table:
    """What every placement would be; the chosen one is marked."""
    headings = ("sent a step", "in a forward", "in a backward", "memory of a rank", "step", "waiting for tables")
    table = _table(("", "placement"), headings)
    for each in plan.placements:
        fits = each.memory_bytes <= plan.device.memory_bytes
        table.add_row(
            "*" if each is plan.chosen else "",
            each.volume.label,
            bytes_text(each.step_bytes),
            bytes_text(each.volume.forward_bytes),
            bytes_text(each.volume.backward_bytes),
            bytes_text(each.memory_bytes) + ("" if fits else ", too much"),
            "-" if each.refused else time_text(each.time.total_us),
            "-" if each.refused else time_text(each.time.exposed_exchange_us + each.time.copies_us),
        )
    return table


def collective_table(plan: Plan) -> Table:
    """What the chosen placement sends in one lookup."""
    table = _table(("pass", "collective", "payload", "beside skipped layers"), ("bytes",))
    for each in plan.chosen.volume.collectives:
        table.add_row(
            each.phase,
            each.kind.replace("_", "-"),
            each.payload,
            "yes" if each.travels else "no",
            f"{each.sent_bytes:,}",
        )
    return table


def memory_table(plan: Plan) -> Table:
    """The parts of a rank's memory."""
    table = _table(("part",), ("bytes", "share"))
    for part in plan.chosen.memory:
        table.add_row(part.name, bytes_text(part.bytes), share_text(part.bytes / plan.device.memory_bytes))
    total = plan.chosen.memory_bytes
    table.add_row("total", bytes_text(total), share_text(total / plan.device.memory_bytes))
    return table


def time_table(plan: Plan) -> Table:
    """Where the step's time goes."""
    time = plan.chosen.time
    table = _table(("part",), ("time", "nothing hides"))
    for name, all_us, exposed_us in (
        ("attention, MLP, head", time.dense_us, time.dense_us),
        ("memory layers", time.memory_us, time.memory_us),
        ("optimiser", time.optimizer_us, time.optimizer_us),
        ("exchange of tables", time.exchange_us, time.exposed_exchange_us),
        ("gradients of copied tables", time.copies_us, time.copies_us),
        ("dense weights and gradients", time.dense_collectives_us, time.dense_collectives_us),
    ):
        table.add_row(name, time_text(all_us), time_text(exposed_us))
    table.add_row("total", "", time_text(time.total_us))
    return table


def _table(names: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table()
    for heading in names:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table
