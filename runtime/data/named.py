"""Corpora that have a name: their sources and what of them is out of domain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ultramem.runtime.data import gutenberg
from ultramem.runtime.data.sources import Source, TextSource, open_sources

_PACKAGED = Path(__file__).parent.parent / "corpus"


class Sources(NamedTuple):
    """What is trained on and held out, and what is neither."""

    in_domain: list[Source]
    out_of_domain: list[Source]


def _austen() -> Sources:
    folder = _PACKAGED / "austen"
    in_domain = [_text(folder / name) for name in ("emma.txt", "persuasion.txt", "sense-and-sensibility.txt")]
    return Sources(in_domain, [_text(folder / "alice-in-wonderland.txt")])


def _gutenberg() -> Sources:
    folder = gutenberg.gutenberg_folder()
    gutenberg.check_gutenberg(folder)
    outside = [_text(folder / name, gutenberg.OUT_OF_DOMAIN_BYTES.get(name)) for name in gutenberg.OUT_OF_DOMAIN]
    return Sources([_text(folder / name) for name in gutenberg.IN_DOMAIN], outside)


def _text(path: Path, max_bytes: int | None = None) -> Source:
    return TextSource(name=path.name, path=path, max_bytes=max_bytes)


NAMED: dict[str, Callable[[], Sources]] = {"austen": _austen, "gutenberg": _gutenberg}


def find_sources(data: str, *, text_field: str = "text") -> Sources:
    """The sources of a named corpus, a file or a folder.

    Raises:
        FileNotFoundError: no such name, file or folder, or a corpus that has not been downloaded.
    """
    if data in NAMED:
        return NAMED[data]()
    if not Path(data).exists():
        raise FileNotFoundError(
            f"data must be {', '.join(NAMED)}, a text, JSONL or Parquet file, a folder of such, a dataset on disk or "
            f"prepared data, got {data!r}"
        )
    return Sources(open_sources(Path(data), text_field=text_field), [])
