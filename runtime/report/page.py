"""One self-contained HTML file: text, numbers that point into the embedded JSON, tables, and the atomic write."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from ultramem.graph.weights import write_atomically

_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:%|(?:[µm]?s|[kMGT]?(?:B|FLOP)|times)\b))")
TEMPLATE = Path(__file__).with_name("page.html")

SHOWN_LETTERS = 24
"""Of a text in a table, about: the rest may be cut, and shows where the pointer rests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One cell of a table. A number says where in the embedded JSON it comes from, or its exact value."""

    text: str
    path: str | None = None
    """JSON pointer to the value that is shown."""
    value: float | None = None
    """The exact value, where it is computed from the JSON rather than in it."""
    is_text: bool = False
    is_best: bool = False


def write_report(path: Path, document: str) -> None:
    """Write the page so that a reader sees the old file or the new one, never a part."""
    write_atomically(path, document.encode())


def page(title: str, body: Iterable[str], data: Any) -> str:
    """The whole file."""
    # "<" cannot end the script element where it is escaped; JSON reads it back the same.
    embedded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title), body="\n".join(body), data=embedded
    )


def escape(text: object) -> str:
    """Text that HTML shows as it is."""
    return html.escape(str(text))


def heading(text: str) -> str:
    """Text of a heading, in which no line breaks between a number and its unit."""
    return escape(_BEFORE_UNIT.sub("\u00a0", text))


def section(title: str, *content: str, note: str = "") -> str:
    """A card with a heading that says what is seen."""
    caption = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{heading(title)}</h2>{caption}{''.join(content)}</section>"


def details(summary: str, *content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(content)}</details>"


def number(text: str, path: str, *, tag: str = "span", classes: str = "") -> str:
    """A number outside a table, with its place in the JSON."""
    attribute = f' class="{classes}"' if classes else ""
    return f'<{tag}{attribute} data-path="{escape(path)}">{escape(text)}</{tag}>'


def text_cell(text: object) -> Cell:
    """A left-aligned cell."""
    return Cell(text=str(text), is_text=True)


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    group_starts: Iterable[int] = (),
    total_rows: Iterable[int] = (),
) -> str:
    """A table that scrolls sideways where it is too wide; a column is aligned as its first cell."""
    starts, totals = set(group_starts), set(total_rows)
    aligned = [cell.is_text for cell in rows[0]] if rows else [True] * len(headings)
    head = "".join(
        f'<th scope="col"{" class=text" if is_text else ""}>{escape(heading)}</th>'
        for heading, is_text in zip(headings, aligned, strict=True)
    )
    body = []
    for index, row in enumerate(rows):
        classes = " ".join(name for name, chosen in (("group", starts), ("total", totals)) if index in chosen)
        attribute = f' class="{classes}"' if classes else ""
        body.append(f"<tr{attribute}>{''.join(_cell(cell) for cell in row)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    classes = " ".join(name for name, chosen in (("text", cell.is_text), ("best", cell.is_best)) if chosen)
    attributes = f' class="{classes}"' if classes else ""
    if cell.path is not None:
        attributes += f' data-path="{escape(cell.path)}"'
    if cell.value is not None:
        attributes += f' data-value="{cell.value!r}"'
    if cell.is_text and len(cell.text) > SHOWN_LETTERS:
        attributes += f' title="{escape(cell.text)}"'
    return f"<td{attributes}>{escape(cell.text)}</td>"


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Terms and what they are; the second of a pair is HTML."""
    return f"<dl>{''.join(f'<dt>{escape(term)}</dt><dd>{what}</dd>' for term, what in pairs)}</dl>"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """(label, CSS background or class name) pairs."""
    items = []
    for label, look in entries:
        swatch = f'class="swatch {look}"' if look.isalpha() else f'class="swatch" style="background:{look}"'
        items.append(f"<span><i {swatch}></i>{escape(label)}</span>")
    return f'<div class="legend">{"".join(items)}</div>'
