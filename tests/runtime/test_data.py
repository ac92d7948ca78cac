"""What is trained on, what is held out, and that every held-out byte is predicted once."""

import pytest
import torch

from ultramem.runtime.data import END_OF_TEXT, IGNORE, evaluation_batches, load_corpus, training_batch


def test_austen_is_two_megabytes_with_nothing_in_two_parts():
    corpus = load_corpus("austen")
    assert len(corpus.train) == len(corpus.held_out) == 3
    assert len(corpus.out_of_domain) == 1
    assert sum(map(len, corpus.train)) + sum(map(len, corpus.held_out)) == 887071 + 466292 + 673022
    for train, held_out in zip(corpus.train, corpus.held_out, strict=True):
        share = len(held_out) / (len(train) + len(held_out))
        assert share == pytest.approx(0.05, abs=1e-4)
        assert held_out[:200].numpy().tobytes() not in train.numpy().tobytes()
    assert b"Alice" in corpus.out_of_domain[0].numpy().tobytes()


def test_own_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("b" * 200)
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "ignored.md").write_text("no")
    corpus = load_corpus(str(tmp_path))
    assert [len(part) for part in corpus.train] == [95, 190]
    assert [len(part) for part in corpus.held_out] == [5, 10]
    assert corpus.train_stream().tolist()[:3] == [END_OF_TEXT, ord("a"), ord("a")]
    assert load_corpus(str(tmp_path / "a.txt")).train_stream().tolist() == [END_OF_TEXT] + [ord("a")] * 95


def test_missing_and_empty_text_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_corpus("nowhere")
    with pytest.raises(FileNotFoundError, match=r"no \*\.txt"):
        load_corpus(str(tmp_path))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="empty"):
        load_corpus(str(tmp_path))


def test_a_batch_is_a_function_of_seed_and_step():
    stream = torch.arange(1000, dtype=torch.int16)

    def draw(seed, step):
        return training_batch(stream, step=step, seed=seed, batch_size=4, sequence_length=16)

    batch = draw(0, 5)
    assert torch.equal(batch.targets_BS, batch.inputs_BS + 1)
    assert torch.equal(batch.inputs_BS, draw(0, 5).inputs_BS)
    assert not torch.equal(batch.inputs_BS, draw(0, 6).inputs_BS)
    assert not torch.equal(batch.inputs_BS, draw(1, 5).inputs_BS)


def test_windows_reach_both_ends_of_the_stream():
    stream = torch.arange(18, dtype=torch.int16)
    batch = training_batch(stream, step=0, seed=0, batch_size=64, sequence_length=16)
    assert batch.inputs_BS.min() == 0
    assert batch.targets_BS.max() == 17
    with pytest.raises(ValueError, match=r"at least sequence_length \+ 1 = 19 tokens to train on, got 18"):
        training_batch(stream, step=0, seed=0, batch_size=1, sequence_length=18)


@pytest.mark.parametrize(("lengths", "sequence_length"), [((10,), 4), ((1, 9), 3), ((8, 8), 8), ((17, 3), 64)])
def test_every_byte_is_a_target_once(lengths, sequence_length):
    start, documents = 0, []
    for length in lengths:
        documents.append(torch.arange(start, start + length, dtype=torch.uint8))
        start += length
    batches = list(evaluation_batches(tuple(documents), batch_size=2, sequence_length=sequence_length))
    assert {batch.inputs_BS.shape for batch in batches} == {(2, sequence_length)}
    targets = torch.cat([batch.targets_BS.flatten() for batch in batches])
    assert sorted(targets[targets != IGNORE].tolist()) == list(range(start))
    for batch in batches:
        counted = batch.targets_BS != IGNORE
        follows = batch.inputs_BS[counted] + 1 == batch.targets_BS[counted]
        first = (batch.inputs_BS[counted] == END_OF_TEXT) & torch.isin(
            batch.targets_BS[counted], torch.tensor([0, *lengths])
        )
        assert (follows | first).all()


def test_max_tokens_takes_from_every_document():
    documents = (torch.zeros(100, dtype=torch.uint8), torch.ones(100, dtype=torch.uint8))
    batches = evaluation_batches(documents, batch_size=4, sequence_length=8, max_tokens=40)
    targets = torch.cat([batch.targets_BS.flatten() for batch in batches])
    assert (targets == 0).sum() == (targets == 1).sum() == 20
