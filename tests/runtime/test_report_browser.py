"""The report in a real browser: it fits a phone and a desktop, and shows the numbers of its JSON."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from made_up_profile import make_document
from shown_page import agrees, at

from ultramem.runtime.report import render_profile, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# The report has no scripts of its own, so another page looks at it from outside.
LOOK = """<!doctype html><iframe id="report" src="report.html" style="width:{width}px;height:3000px;border:0"></iframe>
<script>
addEventListener("load", () => {{
  const page = document.getElementById("report").contentDocument;
  const shown = [...page.querySelectorAll("[data-path]")].map(each => [each.dataset.path, each.textContent]);
  // Dots of log plots: how far up their canvas they stand, and how far a pixel is.
  const points = [...page.querySelectorAll("[data-point]")].map(dot => {{
    const canvas = dot.parentElement, box = canvas.getBoundingClientRect(), own = dot.getBoundingClientRect();
    const up = (box.bottom - (own.top + own.bottom) / 2) / box.height;
    return [dot.dataset.point, +canvas.dataset.low, +canvas.dataset.high, up, 1 / box.height];
  }});
  const wide = [...page.querySelectorAll("section, header, .plot, .tiles")]
    .filter(each => each.scrollWidth > each.clientWidth + 1).map(each => each.className || each.tagName);
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = JSON.stringify({{width: page.documentElement.scrollWidth, wide, shown, points}});
  document.body.append(found);
}});
</script>"""


def look_at(report: str, folder: Path, width: int) -> dict[str, Any]:
    write_report(folder / "report.html", report)
    (folder / "look.html").write_text(LOOK.format(width=width))
    dom = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            f"--user-data-dir={folder / 'browser'}", "--virtual-time-budget=10000", "--dump-dom",
            (folder / "look.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[:500]
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_fits_and_its_numbers_are_the_jsons(width: int, tmp_path: Path) -> None:
    documents = [make_document("one"), make_document("another-with-a-long-name")]
    seen = look_at(render_profile(*documents), tmp_path, width)
    assert seen["width"] <= width
    assert seen["wide"] == []
    assert len(seen["shown"]) > 500
    for pointer, text in seen["shown"]:
        value = at({"profiles": documents}, pointer)
        is_none = text == "–" and value == 0  # noqa: RUF001  # an en dash
        assert is_none or agrees(text, value, seconds=pointer.endswith("seconds")), (pointer, text, value)
    assert len(seen["points"]) == 2 * 2 * 2 * 4  # models, engines, batches and plots
    for pointer, low, high, up, pixel in seen["points"]:
        value = at({"profiles": documents}, pointer)
        assert up == pytest.approx(math.log(value / low) / math.log(high / low), abs=1.5 * pixel), (pointer, value)
