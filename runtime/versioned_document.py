"""JSON documents that say what they are and of which format."""

from __future__ import annotations

from typing import Any


def check_version(document: Any, *, kind: str, format_version: int, name: str) -> dict[str, Any]:
    """A document that was read from a file, its kind and version checked.

    Args:
        document: what JSON held.
        kind: that it must be of.
        format_version: the one that is read.
        name: of such a document, for the error.

    Raises:
        ValueError: it is something else, or of another format.
    """
    found = document.get("kind") if isinstance(document, dict) else None
    if found != kind:
        raise ValueError(f"a {name} must have kind {kind!r}, got {found!r}")
    version = document.get("format_version")
    if version != format_version:
        raise ValueError(f"a {name} must have format_version {format_version}, got {version!r}")
    return dict(document)


def plain(value: Any) -> Any:
    """Tuples as lists, as they come back from a file."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
