"""The one document of a measurement that is not a row of a suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ultramem.graph.weights import write_atomically


def publish(document: dict[str, Any], out: Path | None) -> None:
    """Write the document to `out`, if there is one, and print it as the last line."""
    if out is not None:
        write_atomically(out, json.dumps(document, indent=1).encode() + b"\n")
    print(json.dumps(document))
