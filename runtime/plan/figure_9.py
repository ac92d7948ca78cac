"""Figure 9 of the paper, for one model: which of rows and columns sends less, by ranks and value dim.

The paper draws the relation of P and v_dim at which number-wise and dimension-wise partitioning send the same. Here it
is drawn twice: by the paper's formulas (forward alone, no cores, no blocks), and for the model as it is trained. Beside
it stands what one token's lookup sends at the model's own value dim.
"""

from __future__ import annotations

import dataclasses

from ultramem.runtime.plan.exchange import PAPER_WIRE, LookupShape, Wire, lookup_shape
from ultramem.runtime.plan.memory import require_memory
from ultramem.runtime.plan.plan import Plan
from ultramem.runtime.plan.svg_plot import Note, Panel, PlotLine, svg_plot
from ultramem.runtime.plan.volumes import columns, equal_value_dim, rows_at_home, rows_at_owner
from ultramem.runtime.profile.units import bytes_text, number_text

LAST_RANKS = 4096
VALUE_DIMS = (16.0, 16384.0)
TOKENS = 4096
"""Of a lookup whose bytes a token are drawn: so many that counts do not show."""


def figure_9(plan: Plan) -> str:
    """The figure as SVG.

    Raises:
        ValueError: slots are experts, whose input rows are not drawn, or there are no more slots than blocks, so that
            columns never send less.
    """
    memory = require_memory(plan.config)
    if memory.expert_dim:
        raise ValueError(f"plot must be of a model without experts as slots, got {plan.name}")
    shape, wire = lookup_shape(memory, TOKENS), dataclasses.replace(plan.options.wire, count_bytes=0)
    if equal_value_dim(shape, 2, wire) is None:
        raise ValueError(f"plot must be of a model with more slots than blocks, got {shape.slots} and {shape.blocks}")
    ranks = [2 ** (power / 4) for power in range(4, 4 * LAST_RANKS.bit_length() - 3)]
    summary = (
        f"Which of rows and columns sends less for {plan.name}, by ranks and value dim, and the bytes that a token's "
        f"lookup sends by ranks"
    )
    return svg_plot([_map(plan, shape, wire, ranks), _volumes(plan, shape, wire)], summary=summary)


def crossing_ranks(shape: LookupShape, wire: Wire, *, training: bool) -> int | None:
    """The least number of ranks from which on rows at home send less than columns, at the shape's value dim.

    None where columns send less up to as many ranks as there are columns.
    """
    for ranks in range(2, shape.value_dim + 1):
        equal = equal_value_dim(shape, ranks, wire, training=training)
        if equal is None or equal > shape.value_dim:
            return ranks
    return None


def _map(plan: Plan, shape: LookupShape, wire: Wire, ranks: list[float]) -> Panel:
    """Value dim over ranks: where the two send the same."""
    plain = dataclasses.replace(shape, cores=1, blocks=1)

    def line(of: LookupShape, on: Wire, training: bool) -> list[tuple[float, float]]:
        # The relation is linear in the ranks, so two numbers of ranks say all of it.
        one, two = (equal_value_dim(of, each, on, training=training) for each in (1, 2))
        assert one is not None
        assert two is not None
        return [(each, one + (two - one) * (each - 1)) for each in ranks]

    ours = PlotLine(label="as trained", points=line(shape, wire, training=True), color="a")
    papers = PlotLine(
        label="the paper's formulas", points=line(plain, PAPER_WIRE, training=False), color="b", dashed=True
    )
    here = Note(
        text=f"{plan.options.table_ranks} ranks, {shape.value_dim} wide",
        x=min(max(plan.options.table_ranks, 2), LAST_RANKS),
        y=shape.value_dim,
        dot=True,
        anchor="start" if plan.options.table_ranks <= 8 else "end",
    )
    return Panel(
        title=f"Which sends less: {plan.name}, {shape.slots} rows a token",
        x_title="ranks",
        y_title="value dim",
        x_range=(2, LAST_RANKS),
        y_range=VALUE_DIMS,
        y_marks=[16.0 * 4**power for power in range(6)],
        lines=(ours, papers),
        y_text=lambda y: f"{y:.0f}",
        above=ours,
        notes=(
            Note(text="columns send less", x=2.6, y=6000),
            Note(text="rows send less", x=3300, y=28, anchor="end"),
            here,
        ),
    )


def _volumes(plan: Plan, shape: LookupShape, wire: Wire) -> Panel:
    """Bytes of a token's lookup over ranks, at the model's value dim."""
    counts = [2**power for power in range(1, LAST_RANKS.bit_length())]
    makers = (("rows at home", rows_at_home, "b"), ("rows at owner", rows_at_owner, "c"), ("columns", columns, "a"))
    lines = [
        PlotLine(
            label=label,
            points=[(ranks, make(shape, ranks, wire).total_bytes / TOKENS) for ranks in counts],
            color=color,
        )
        for label, make, color in makers
    ]
    highest = max(y for line in lines if line.label != "rows at owner" for _, y in line.points)
    lowest = min(y for line in lines for _, y in line.points)
    notes = []
    crossing = crossing_ranks(shape, wire, training=True)
    if crossing is not None and crossing <= LAST_RANKS:
        sent = rows_at_home(shape, crossing, wire).total_bytes / TOKENS
        notes.append(Note(text=f"{number_text(crossing)} ranks", x=crossing, y=sent, dot=True, anchor="end"))
    return Panel(
        title=f"What a token's lookup sends, rows {shape.value_dim} wide",
        x_title="ranks",
        y_title="bytes sent, forward and backward",
        x_range=(2, LAST_RANKS),
        y_range=(lowest / 1.5, highest * 2),
        lines=lines,
        y_text=bytes_text,
        notes=notes,
    )
