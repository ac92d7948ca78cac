"""Prepared data: the same tokens as in memory, whatever ends the preparation, and nothing read but what is needed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ultramem.runtime.data import IGNORE, evaluation_batches, load_corpus, training_batch
from ultramem.runtime.data.documents import ShardedTokens
from ultramem.runtime.data.prepare import PrepareConfig, prepare
from ultramem.runtime.evaluate import evaluate
from ultramem.runtime.hugging_face_tokenizer import train_bpe


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for name, sentence in (("a", "The naïve café ☕ was open all night. "), ("b", "Nobody came in, and nobody left. ")):
        (folder / f"{name}.txt").write_text("".join(f"{index}. {sentence}\n" for index in range(400)))
    return str(folder)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def documents(part):
    return [document.long().tolist() for document in part]


def tokens(stream):
    return stream[torch.arange(len(stream))].long()


@pytest.mark.parametrize("shard_tokens", [1 << 24, 1000, 7])
def test_prepared_bytes_are_those_in_memory(books, tmp_path, shard_tokens):
    if shard_tokens == 7:
        (Path(books) / "a.txt").write_text("tiny text of a few bytes")
        (Path(books) / "b.txt").write_text("another")
    manifest = prepare(books, tmp_path / "out", PrepareConfig(shard_tokens=shard_tokens))
    memory, prepared = load_corpus(books), load_corpus(str(tmp_path / "out"))
    for name in ("train", "held_out", "out_of_domain"):
        assert documents(getattr(prepared, name)) == documents(getattr(memory, name))
        split = manifest["splits"][name]
        assert split["documents"] == len(getattr(memory, name))
        assert split["bytes"] == sum(map(len, getattr(memory, name)))
        assert all(shard["tokens"] == shard_tokens for shard in split["shards"][:-1])
    assert torch.equal(tokens(prepared.train_stream()), tokens(memory.train_stream()))
    for step in range(3):
        if shard_tokens > 7:
            options = {"step": step, "seed": 3, "batch_size": 8, "sequence_length": 64}
            batch, expected = (training_batch(each.train_stream(), **options) for each in (prepared, memory))
            assert torch.equal(batch.inputs_BS, expected.inputs_BS)
            assert torch.equal(batch.targets_BS, expected.targets_BS)
            assert batch.inputs_BS.dtype == torch.int64


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (None, "uint8")])
def test_any_tokenizer_and_its_bytes(books, tmp_path, vocab_size, dtype):
    """Bits per byte of a model that gives every token the same probability are known: they must come out."""
    if vocab_size is None:  # of a tokenizer of at most 256 ids
        document = train_bpe([b"ab"], 257).to_dict()["tokenizer"]
        used = {char for path in Path(books).iterdir() for char in document_alphabet(path.read_bytes())}
        document["model"]["vocab"] = {"<|endoftext|>": 0} | {char: 1 + index for index, char in enumerate(sorted(used))}
        (tmp_path / "small.json").write_text(json.dumps(document))
        config = PrepareConfig(tokenizer=str(tmp_path / "small.json"))
    else:
        config = PrepareConfig(tokenizer="bpe", vocab_size=vocab_size)
    manifest = prepare(books, tmp_path / "out", config)
    assert manifest["dtype"] == dtype
    corpus = load_corpus(str(tmp_path / "out"))
    texts = [(Path(books) / name).read_text() for name in ("a.txt", "b.txt")]
    for text, train, held_out in zip(texts, corpus.train, corpus.held_out, strict=True):
        assert corpus.tokenizer.decode(train.tolist()) + corpus.tokenizer.decode(held_out.tolist()) == text

    class Uniform(torch.nn.Module):
        embedding = torch.nn.Embedding(1, 1)

    def uniform_loss(inputs, targets):
        return (targets != IGNORE).sum() * torch.log(torch.tensor(corpus.tokenizer.vocab_size, dtype=torch.float64))

    batches = evaluation_batches(corpus.held_out, batch_size=2, sequence_length=16)
    result = evaluate(Uniform(), uniform_loss, batches, token_bytes=corpus.tokenizer.token_bytes)
    held_out_bytes = sum(len(corpus.tokenizer.decode(document.tolist()).encode()) for document in corpus.held_out)
    assert result.tokens == sum(map(len, corpus.held_out))
    assert result.text_bytes == held_out_bytes == manifest["splits"]["held_out"]["bytes"]
    bits = result.tokens * np.log2(corpus.tokenizer.vocab_size)
    assert result.bits_per_byte == pytest.approx(bits / held_out_bytes, rel=1e-6)


def document_alphabet(text):
    from ultramem.runtime.hugging_face_tokenizer import _byte_level_alphabet

    char_of = {byte: char for char, byte in _byte_level_alphabet().items()}
    return {char_of[byte] for byte in text}


def test_evaluation_begins_each_document_with_the_tokenizers_end_of_text(books, tmp_path):
    prepare(books, tmp_path / "out", PrepareConfig(tokenizer="bpe", vocab_size=300))
    corpus = load_corpus(str(tmp_path / "out"))
    (batch,) = evaluation_batches(corpus.held_out, batch_size=2, sequence_length=2000)
    assert batch.inputs_BS[:, 0].tolist() == [corpus.tokenizer.end_of_text] * 2 == [0, 0]
    assert batch.targets_BS[1, : len(corpus.held_out[1])].tolist() == corpus.held_out[1].tolist()


def test_few_tokens_of_many_documents_are_whole_sequences():
    many = tuple(torch.full((100,), index, dtype=torch.uint8) for index in range(250))
    batches = list(evaluation_batches(many, batch_size=4, sequence_length=20, max_tokens=200))
    targets = torch.cat([batch.targets_BS.flatten() for batch in batches])
    assert targets[targets != IGNORE].tolist() == [25 * index for index in range(10) for _ in range(20)]


def test_out_of_domain_text_is_kept_whole(books, tmp_path):
    (tmp_path / "other.txt").write_text("Quite another matter.")
    prepare(books, tmp_path / "out", PrepareConfig(), out_of_domain=str(tmp_path / "other.txt"))
    (document,) = load_corpus(str(tmp_path / "out")).out_of_domain
    assert bytes(document.tolist()) == b"Quite another matter."


COMMAND = [sys.executable, "-m", "ultramem", "data", "prepare"]
OPTIONS = ["--tokenizer", "bpe", "--vocab-size", "300", "--shard-tokens", "20000", "--json"]


@pytest.fixture
def large(tmp_path):
    """Rows and files that take some seconds to prepare."""
    folder = tmp_path / "large"
    folder.mkdir()
    rows = (json.dumps({"text": f"Row {index}: the quick brown fox, naïve as ever. " * 4}) for index in range(6000))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "book.txt").write_text(
        "".join(f"{index} It is a truth universally acknowledged.\n" for index in range(30000))
    )
    return str(folder)


def wait_for(process, path, moment):
    while process.poll() is None and not path.exists():
        time.sleep(0.001)
    time.sleep(moment)


def test_sigkill_at_any_moment_changes_nothing(large, tmp_path):
    subprocess.run([*COMMAND, large, "--out", tmp_path / "whole", *OPTIONS], check=True, capture_output=True)
    cut, kills = tmp_path / "cut", 0
    records = ("request.json", "held_out-00000.json", "train-00001.json", "train-00009.json")
    for moment, record in enumerate(records):
        process = subprocess.Popen([*COMMAND, large, "--out", cut, *OPTIONS], stdout=-3, stderr=-3)
        wait_for(process, cut / "progress" / record, 0.003 * moment)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        shards = {path.name: path.stat().st_mtime_ns for path in (cut / "progress").glob("train-*.json")}
    assert kills >= 3
    assert not (cut / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"cut is not wholly prepared; run the same `ultramem data prepare` again"):
        load_corpus(str(cut))
    written = {path.name: path.stat().st_mtime_ns for path in cut.glob("train-*.bin")}
    subprocess.run([*COMMAND, large, "--out", cut, *OPTIONS], check=True, capture_output=True)
    assert contents(cut) == contents(tmp_path / "whole")
    kept = [name.replace(".json", ".bin") for name in shards]
    assert len(kept) >= 5
    assert all((cut / name).stat().st_mtime_ns == written[name] for name in kept)  # not made again


def test_ctrl_c_saves_and_exits_130(large, tmp_path):
    options = [word if word != "20000" else "100000000" for word in OPTIONS]
    out = tmp_path / "out"
    process = subprocess.Popen([*COMMAND, large, "--out", out, *options], stdout=-3, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(path.stat().st_size for path in out.glob(".train-00000.bin.*.tmp")):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1].endswith("what is done is saved; the same command goes on from there")
    assert list(out.glob(".*.tmp")) == []
    begun = json.loads((out / "progress/train.begun.json").read_text())
    assert begun["shard"]["tokens"] > 0
    subprocess.run([*COMMAND, large, "--out", out, *options], check=True, capture_output=True)
    subprocess.run([*COMMAND, large, "--out", tmp_path / "whole", *options], check=True, capture_output=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_second_preparation_changes_nothing_and_other_arguments_are_refused(books, tmp_path):
    out = tmp_path / "out"
    first = prepare(books, out, PrepareConfig())
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(books, out, PrepareConfig()) == first
    with pytest.raises(ValueError, match=r"held_out must be 0.05, with which .*out was begun, got 0.1"):
        prepare(books, out, PrepareConfig(held_out=0.1))
    with pytest.raises(ValueError, match="tokenizer must be 'bytes'"):
        prepare(books, out, PrepareConfig(tokenizer="bpe"))
    (Path(books) / "c.txt").write_text("one more")
    with pytest.raises(ValueError, match="files have changed since"):
        prepare(books, out, PrepareConfig())
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_folder_of_something_else_is_not_touched(books, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/diary.txt").write_text("dear diary")
    with pytest.raises(FileExistsError, match="holds something else"):
        prepare(books, tmp_path / "out", PrepareConfig())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["diary.txt"]


@pytest.mark.parametrize("damage", ["flip a bit", "cut", "gone", "version", "not JSON", "tokenizer"])
def test_damage_is_refused_and_named(books, tmp_path, damage):
    out = tmp_path / "out"
    prepare(books, out, PrepareConfig(shard_tokens=5000))
    shard, manifest = out / "train-00001.bin", out / "manifest.json"
    data = bytearray(shard.read_bytes())
    if damage == "flip a bit":
        data[7] ^= 1
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(data[:-2])
    elif damage == "gone":
        shard.unlink()
    elif damage == "version":
        manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    elif damage == "not JSON":
        manifest.write_text("{")
    else:
        train_bpe([b"aaaa abab"], 258).save(out)
    before = contents(out)
    expected = {
        "flip a bit": "train-00001.bin is damaged: its sha256 must be",
        "cut": "train-00001.bin is damaged: it must have 10000 bytes, got 9998",
        "gone": "train-00001.bin is missing",
        "version": "must have format_version 1, got 9",
        "not JSON": "is not valid JSON",
        "tokenizer": "the tokenizer in .* is not the one of its manifest.json",
    }[damage]
    with pytest.raises(ValueError, match=expected):
        load_corpus(str(out))
    assert contents(out) == before


def test_a_damaged_shard_is_not_resumed_from(books, tmp_path, monkeypatch):
    out, config = tmp_path / "out", PrepareConfig(shard_tokens=5000)
    with monkeypatch.context() as patch:
        patch.setattr("ultramem.runtime.data.prepare.write_manifest", None)  # ends the run when all shards are there
        with pytest.raises(TypeError):
            prepare(books, out, config)
    whole = (out / "train-00001.bin").read_bytes()
    (out / "train-00001.bin").write_bytes(b"x" * 10000)
    with pytest.raises(ValueError, match=r"train-00001.bin is damaged"):
        prepare(books, out, config)
    (out / "train-00001.bin").write_bytes(whole)
    prepare(books, out, config)
    assert documents(load_corpus(str(out)).train) == documents(load_corpus(books).train)


def test_only_the_windows_are_read(tmp_path):
    """A stream of 6 billion tokens, holes in files: reading it all would take minutes and 12 GB."""
    shards = []
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(6_000_000_000)
        shards.append(np.memmap(tmp_path / name, dtype="<u2", mode="r+"))
    shards[1][-1] = 7
    shards[1][0] = 8
    stream = ShardedTokens(shards)
    assert len(stream) == 6_000_000_000
    began = time.perf_counter()
    batch = training_batch(stream, step=1, seed=0, batch_size=64, sequence_length=256)
    assert batch.inputs_BS.shape == (64, 256)
    assert time.perf_counter() - began < 5
    assert stream[torch.tensor([[2_999_999_999, 3_000_000_000], [3_000_000_001, 5_999_999_999]])].tolist() == [
        [0, 8],
        [0, 7],
    ]
    assert stream.read(2_999_999_999, 3_000_000_001).tolist() == [0, 8]
    with pytest.raises(IndexError, match=r"positions must be in 0\.\.5999999999"):
        stream[torch.tensor([6_000_000_000])]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from ultramem.runtime.data.prepare import PrepareConfig, prepare
        prepare(sys.argv[1], Path(sys.argv[2]), PrepareConfig(shard_tokens=1 << 22))
        print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        """
    peaks = []
    for megabytes in (4, 40):
        path = tmp_path / f"{megabytes}.txt"
        path.write_text("A line of forty characters, no more here\n" * (megabytes * 25000))
        command = [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())]
        done = subprocess.run([*command, path, tmp_path / str(megabytes)], check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 16 * 1024  # KiB; the text alone would be 36 MB more


def test_data_of_another_tokenizer_is_refused(books, tmp_path):
    prepare(books, tmp_path / "out", PrepareConfig())
    with pytest.raises(ValueError, match="prepared with another tokenizer than the run's"):
        load_corpus(str(tmp_path / "out"), tokenizer=train_bpe([b"aaaa abab"], 258))


def test_text_in_memory_with_a_tokenizer(books):
    tokenizer = train_bpe([(Path(books) / "a.txt").read_bytes()], 300)
    corpus = load_corpus(books, tokenizer=tokenizer)
    text = (Path(books) / "b.txt").read_text()
    assert tokenizer.decode([*corpus.train[1].tolist(), *corpus.held_out[1].tolist()]) == text
    assert corpus.train_stream()[0] == tokenizer.end_of_text
    assert corpus.sha256 != load_corpus(books).sha256


def test_text_too_large_for_memory_names_the_way_out(books, monkeypatch):
    monkeypatch.setattr("ultramem.runtime.data.corpus.IN_MEMORY_BYTES", 1000)
    with pytest.raises(ValueError, match=r"run `ultramem data prepare .*books --out DIR`"):
        load_corpus(books)
