"""Text as it comes: whole characters, no stop text, nothing lost."""

import random

import pytest

from ultramem.runtime.generate.text_stream import TextStream
from ultramem.runtime.tokenizer import ByteTokenizer


def streamed(text, stop):
    stream = TextStream(ByteTokenizer(), stop)
    pieces = []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


def cut(text, stop):
    """Up to the stop text that is complete first."""
    for end in range(len(text) + 1):
        found = [text[:end].find(each) for each in stop if each in text[:end]]
        if found:
            return text[: min(found)]
    return text


@pytest.mark.parametrize("seed", range(200))
def test_pieces_make_up_the_text_before_the_first_stop(seed):
    draw = random.Random(seed)
    text = "".join(draw.choices("abé€", k=draw.randint(0, 20)))
    stop = ["".join(draw.choices("abé€", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
    pieces = streamed(text, stop)
    assert "".join(pieces) == cut(text, stop)


def test_text_is_held_back_no_longer_than_it_may_be_a_stop():
    stream = TextStream(ByteTokenizer(), ["stop!"])
    assert [stream.push(token) for token in b"a stork"] == ["a", " ", "", "", "", "stor", "k"]
    assert [stream.push(token) for token in b"st"] == ["", ""]
    assert stream.finish() == "st"
    assert not stream.stopped


def test_a_character_comes_whole():
    stream = TextStream(ByteTokenizer(), [])
    assert [stream.push(token) for token in "é€".encode()] == ["", "é", "", "", "€"]


def test_bytes_that_are_no_character_come_out_in_the_end():
    stream = TextStream(ByteTokenizer(), [])
    assert stream.push(0xE2) == ""
    assert stream.finish() == "\ufffd"
