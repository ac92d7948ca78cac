"""The page of one figure: curves by arithmetic, the paper's statements, and measurements beside their predictions."""

from __future__ import annotations

from typing import Any

from ultramem.runtime.figures.measured_sections import checks_section, measured_sections
from ultramem.runtime.figures.schema import check_document
from ultramem.runtime.figures.sections import (
    arithmetic_sections,
    claims_section,
    headline,
    setting_section,
)
from ultramem.runtime.report.page import escape, heading, page


def render_figure(figure_json: dict[str, Any]) -> str:
    """One self-contained HTML page of a figure (the document of `ultramem.runtime.figures.to_json`).

    Raises:
        ValueError: the document is not a figure, or of a format that this version does not read.
    """
    document = check_document(figure_json)
    title = f"Figure {document['figure']} on {document['device']['label']}: {headline(document)}"
    lead = (
        f"{document['setting']['caption']} (arXiv 2411.12364). Here by arithmetic on the roofs of "
        f"{document['device']['label']}"
    )
    lead += ", and measured there at sizes that it holds." if document["measured"] else "."
    body = [
        f'<header><h1>{heading(title)}</h1><p class="lead">{escape(lead)}</p></header>',
        *arithmetic_sections(document),
        claims_section(document),
    ]
    if document["measured"]:
        body += [*measured_sections(document), checks_section(document)]
    body.append(setting_section(document))
    return page(f"Figure {document['figure']}, {document['device']['label']}", body, document)
