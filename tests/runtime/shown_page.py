"""What a reader of a page sees, and whether it is what the JSON in the page says."""

from __future__ import annotations

import html.parser
import json
import re
from typing import Any

UNITS = {
    "µs": 1.0, "ms": 1e3, "s": 1e6, "%": 1e-2, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "FLOP": 1.0, "kFLOP": 1e3, "MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12, "k": 1e3, "M": 1e6, "G": 1e9, "": 1.0,
}  # fmt: skip
VOID = {"meta", "br", "line", "polyline", "polygon"}


class Page(html.parser.HTMLParser):
    """Shown text by the JSON pointer or the value that its element carries; and a check that elements nest."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[tuple[str, str]] = []
        self.values: list[tuple[float, str]] = []
        self.text = ""
        self.data = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(document)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not self.open:
            return
        tag, attributes = self.open[-1]
        if tag == "script":
            self.data += data
        elif tag != "style":
            self.text += data
            if attributes.get("data-path"):
                self.shown.append((str(attributes["data-path"]), data))
            if attributes.get("data-value"):
                self.values.append((float(str(attributes["data-value"])), data))


def at(document: Any, pointer: str) -> Any:
    for part in pointer.removeprefix("/").split("/"):
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def agrees(text: str, value: float, *, seconds: bool) -> bool:
    """Whether a shown number is `value`, rounded to the digits that are shown."""
    match = re.fullmatch(r"(-?[\d,]*\.?\d+(?:e[+-]\d+)?)(?: (.*))?", text)
    assert match, text
    number, unit = match[1].replace(",", ""), match[2] or ""
    scale = 1.0 if seconds and unit == "s" else UNITS[unit]
    digits, _, power = number.partition("e")
    step = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
    if "." not in number:  # "12,300" has three significant digits, "12" two
        step *= 10.0 ** max(0, len(number) - 3)
    return abs(float(number) * scale - value) <= 0.501 * step * scale


def check_numbers(page: Page) -> None:
    document = json.loads(page.data)
    for pointer, text in page.shown:
        if text == "–":  # noqa: RUF001  # "none"
            assert at(document, pointer) == 0, pointer
            continue
        value = at(document, pointer)
        assert agrees(text, value, seconds=pointer.endswith("seconds")), (pointer, text, value)
    for value, text in page.values:
        assert text == "–" or agrees(text, value, seconds=False), (value, text)  # noqa: RUF001  # "none"
