"""Memory layers beside the layers that they skip: who waits for whom, and the same outputs."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from families import FAMILIES

from ultramem.graph import build_model
from ultramem.graph.side_stream import SideStream
from ultramem.runtime.model_engine import EagerEngine

BASE = FAMILIES["ultramem"]
CONFIG = replace(BASE, num_layers=4, insertions="1:3/2:4", dropout=0.0, memory=replace(BASE.memory, num_layers=4))


class Streams:
    """As `torch.cuda`, of streams that note what is asked of them."""

    def __init__(self):
        self.notes = []
        self.main = self.current = Stream("main", self.notes)

    def Stream(self):  # noqa: N802  # as torch names it
        return Stream("side", self.notes)

    def current_stream(self):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def wait_stream(self, other):
        self.notes.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.notes.append(f"{self.name} marks")
        return "mark"

    def wait_event(self, event):
        self.notes.append(f"{self.name} waits for {event}")


@torch.no_grad()
def test_a_memory_runs_beside_the_layers_that_it_skips():
    torch.manual_seed(0)
    model = build_model(CONFIG).eval()
    streams = Streams()
    beside = copy.deepcopy(model)
    beside.side_stream = SideStream(streams)
    for name, module in beside.named_modules():
        if name in ("memories.0", "memories.1", *(f"blocks.{number}.mlp" for number in range(4))):
            module.register_forward_pre_hook(
                lambda *_, name=name: streams.notes.append(f"{streams.current.name} runs {name}")
            )
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 7))
    assert torch.equal(beside(tokens).logits, model(tokens).logits)
    begun = ["side waits for main", "side runs memories.{}", "side marks"]
    assert streams.notes == [
        *(each.format(0) for each in begun), "main runs blocks.0.mlp",
        *(each.format(1) for each in begun), "main runs blocks.1.mlp",
        "main runs blocks.2.mlp", "main waits for mark",
        "main runs blocks.3.mlp", "main waits for mark",
    ]  # fmt: skip
    assert copy.deepcopy(beside).side_stream is beside.side_stream


def test_there_is_none_on_a_cpu():
    with pytest.raises(ValueError, match="beside must be False on a CPU, which has no streams, got True"):
        EagerEngine(build_model(CONFIG).eval(), beside=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_outputs_on_a_gpu_are_those_of_one_stream():
    torch.manual_seed(0)
    model = build_model(CONFIG, device="cuda").eval()
    engine = EagerEngine(model, beside=True)
    assert engine.model.model.side_stream is not None
    tokens = torch.randint(0, CONFIG.vocab_size, (4, 129))
    logits, cache = engine.prefill(tokens[:, :-1])
    one_stream = EagerEngine(model)
    expected, expected_cache = one_stream.prefill(tokens[:, :-1])
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    for _ in range(20):
        logits, cache = engine.decode(tokens[:, -1:], cache)
        expected, expected_cache = one_stream.decode(tokens[:, -1:], expected_cache)
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)
