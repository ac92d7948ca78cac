"""Documents from the files that people have, and what of them is held out."""

import json
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from ultramem.runtime.data import load_corpus
from ultramem.runtime.data.held_out import HeldOutRule, pieces
from ultramem.runtime.data.sources import open_sources

TEXTS = [f"Document {index} of many, naïve ☕ {'word ' * (index % 7)}" for index in range(300)]


def write_jsonl(path, texts=TEXTS, field="text"):
    path.write_text("".join(json.dumps({"id": index, field: text}) + "\n" for index, text in enumerate(texts)))


def write_parquet(path, texts=TEXTS, field="text"):
    table = pyarrow.table({"id": list(range(len(texts))), field: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=70)


def write_dataset(path, texts=TEXTS, field="text"):
    datasets.Dataset.from_dict({"id": list(range(len(texts))), field: texts}).save_to_disk(str(path))


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet, "dataset": write_dataset}


@pytest.mark.parametrize("kind", WRITERS)
def test_rows_become_documents(kind, tmp_path):
    path = tmp_path / f"data.{kind}"
    WRITERS[kind](path)
    (source,) = open_sources(path)
    documents = list(source.documents())
    assert [document.text.decode() for document in documents] == TEXTS
    assert [document.row for document in documents] == list(range(300))
    assert sum(document.source_bytes for document in documents) == pytest.approx(source.size, rel=1e-6)
    for start in (1, 70, 71, 299, 300):
        assert list(source.documents(start)) == documents[start:]


@pytest.mark.parametrize("kind", WRITERS)
def test_another_field(kind, tmp_path):
    path = tmp_path / f"data.{kind}"
    WRITERS[kind](path, field="content")
    (source,) = open_sources(path, text_field="content")
    assert next(source.documents()).text.decode() == TEXTS[0]
    (source,) = open_sources(path)
    with pytest.raises(ValueError, match=r"must have the (field|column) 'text'"):
        list(source.documents())


@pytest.mark.parametrize("kind", WRITERS)
def test_rows_in_memory_are_held_out_by_their_hash(kind, tmp_path):
    path = tmp_path / f"data.{kind}"
    WRITERS[kind](path, [*TEXTS, *TEXTS[:100]])
    corpus = load_corpus(str(path))
    train, held_out = (
        [bytes(document.tolist()).decode() for document in part] for part in (corpus.train, corpus.held_out)
    )
    assert sorted(train + held_out) == sorted([*TEXTS, *TEXTS[:100]])
    assert not set(train) & set(held_out)  # a text that is there twice is in one part
    assert 6 <= len(held_out) <= 40
    write_jsonl(tmp_path / "same.jsonl", [*TEXTS, *TEXTS[:100]])
    assert load_corpus(str(tmp_path / "same.jsonl")).sha256 == corpus.sha256


def test_splits_of_a_dataset_are_its_parts(tmp_path):
    def dataset(first, last):
        return datasets.Dataset.from_dict({"text": TEXTS[first:last]})

    for names, held_out in [(("train", "validation", "test"), 1), (("train", "test"), 1)]:
        path = tmp_path / "-".join(names)
        parts = {name: dataset(100 * index, 100 * index + 100) for index, name in enumerate(names)}
        datasets.DatasetDict(parts).save_to_disk(str(path))
        corpus = load_corpus(str(path))
        assert [bytes(each.tolist()).decode() for each in corpus.train] == TEXTS[:100]
        assert [bytes(each.tolist()).decode() for each in corpus.held_out] == TEXTS[
            100 * held_out : 100 * held_out + 100
        ]
    datasets.DatasetDict({"validation": dataset(0, 10)}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"must have a split 'train', it has validation"):
        load_corpus(str(tmp_path / "none"))


def test_a_folder_is_read_at_any_depth(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "c" / "z.txt").write_text("zed")
    (tmp_path / ".hidden" / "h.txt").write_text("hidden")
    (tmp_path / "notes.md").write_text("no")
    write_jsonl(tmp_path / "b" / "a.jsonl", ["one", "two"])
    write_parquet(tmp_path / "p.parquet", ["three"])
    sources = open_sources(tmp_path)
    assert [source.name for source in sources] == ["b/a.jsonl", "b/c/z.txt", "p.parquet"]
    assert sum(len(list(source.documents())) for source in sources) == 4


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "row 1 is not valid JSON"),
        ('"text"', "row 1 must have the field 'text'"),
        ('{"text": null}', "row 1: 'text' must be text, got None"),
        ('{"text": "\\ud800"}', "row 1: 'text' is not Unicode text"),
    ],
)
def test_a_bad_line_is_named(line, said, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=said):
        load_corpus(str(tmp_path / "bad.jsonl"))


def test_what_is_not_parquet_is_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR0")
    with pytest.raises(ValueError, match=r"bad.parquet is not a Parquet file"):
        load_corpus(str(tmp_path / "bad.parquet"))


def test_rows_without_text_are_refused(tmp_path):
    write_jsonl(tmp_path / "none.jsonl", ["", ""])
    with pytest.raises(ValueError, match=r"none.jsonl holds no text"):
        load_corpus(str(tmp_path / "none.jsonl"))


def test_importing_brings_in_no_extra():
    code = """if True:
        import sys, ultramem.runtime.data.prepare
        print(sorted({"datasets", "pyarrow", "tokenizers", "pandas"} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("kind", "module"), [("parquet", "pyarrow.parquet"), ("dataset", "datasets")])
def test_a_missing_library_is_named(kind, module, tmp_path, monkeypatch):
    path = tmp_path / f"data.{kind}"
    WRITERS[kind](path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module} is not installed \(pip install ultramem\[data\]\)"):
        load_corpus(str(path))


def test_pieces_hold_all_text_and_no_broken_character(tmp_path, monkeypatch):
    monkeypatch.setattr("ultramem.runtime.data.held_out.PIECE_BYTES", 50)
    text = "☕" * 40 + "\nnaïve\n" + "long line without end " * 10 + "\n🜁" * 30
    (tmp_path / "text.txt").write_text(text)
    sources = open_sources(tmp_path)
    rule = HeldOutRule.of(sources, 0.2, whole_characters=True)
    parts = {}
    for part in ("train", "held_out"):
        found = list(pieces(sources, rule, part))
        assert len(found) >= 2
        assert [piece.first for piece in found] == [True] + [False] * (len(found) - 1)
        parts[part] = "".join(piece.text.decode() for piece in found)  # raises in the middle of a character
    assert parts["train"] + parts["held_out"] == text
    assert len(parts["held_out"].encode()) / len(text.encode()) == pytest.approx(0.2, abs=0.02)


def test_many_small_files_are_held_out_whole(tmp_path):
    for index in range(1001):
        (tmp_path / f"{index:04d}.txt").write_text(f"file {index}")
    sources = open_sources(tmp_path)
    rule = HeldOutRule.of(sources, 0.05, whole_characters=True)
    held_out = [piece.text for piece in pieces(sources, rule, "held_out")]
    train = [piece.text for piece in pieces(sources, rule, "train")]
    assert len(held_out) + len(train) == 1001
    assert 25 <= len(held_out) <= 80
    assert all(text.startswith(b"file ") for text in held_out)
    assert "multiple of 20" in rule.describe(sources)


@pytest.mark.parametrize("share", [0.0, 0.51, float("nan")])
def test_the_share_is_checked(share):
    with pytest.raises(ValueError, match=r"held_out must be above 0 and at most 0.5"):
        HeldOutRule.of([], share, whole_characters=False)
