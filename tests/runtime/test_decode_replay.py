"""Decode steps that are recorded once and replayed, by a stand-in for CUDA graphs on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ultramem.graph import build_model
from ultramem.runtime.decode_replay import PLAIN_RUNS, DecodeReplay, ReplayedRooms
from ultramem.runtime.model_engine import CompiledEngine, EagerEngine


class Recording(TorchDispatchMode):
    """Notes every operator with its tensors, to run it on the same memory again: what a CUDA graph does of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host reads a value, which no recording can do")
        with self:
            result = func.decompose(*args, **(kwargs or {}))
        if result is NotImplemented:
            result = func(*args, **(kwargs or {}))
            self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Graphs:
    """As `torch.cuda`, of graphs on a CPU."""

    CUDAGraph = Recording

    def __init__(self) -> None:
        self.recorded = 0

    @contextmanager
    def graph(self, recording: Recording) -> Iterator[None]:
        self.recorded += 1
        with recording:
            yield


def replaying(model: Any) -> tuple[CompiledEngine, Graphs]:
    """The compiled engine as it is on a GPU; its step is the model's own code, which the stand-in can see into."""
    engine, graphs = CompiledEngine(model), Graphs()
    engine._rooms = ReplayedRooms(graphs)
    engine._prefill_graph, engine._decode_graph = (
        getattr(graph, "_torchdynamo_orig_callable") for graph in (engine._prefill_graph, engine._decode_graph)  # noqa: B009  # mypy
    )  # fmt: skip
    return engine, graphs


def make_model(family: str) -> Any:
    torch.manual_seed(0)
    return build_model(FAMILIES[family]).eval()


@pytest.mark.parametrize("family", ["dense", "moe", "pkm", "ultramem"])
def test_replayed_steps_give_eagers_logits(family: str) -> None:
    """Of prompts of different lengths in one batch, step after step."""
    model = make_model(family)
    engine, graphs = replaying(model)
    eager = EagerEngine(model)
    prompt = torch.randint(model.config.vocab_size, (3, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    logits, cache = engine.prefill(prompt, mask)
    expected, expected_cache = eager.prefill(prompt, mask)
    for _ in range(6):
        torch.testing.assert_close(logits[:, -1], expected[:, -1], rtol=1e-4, atol=1e-5)
        token = expected[:, -1:].argmax(-1)
        logits, cache = engine.decode(token, cache)
        expected, expected_cache = eager.decode(token, expected_cache)
    assert graphs.recorded == 1


@pytest.fixture
def ultramem() -> tuple[CompiledEngine, Graphs, EagerEngine]:
    model = make_model("ultramem")
    return *replaying(model), EagerEngine(model)


def logits_after(engine: Any, prompt: Tensor, tokens: Tensor) -> list[Tensor]:
    logits, cache = engine.prefill(prompt)
    found = [logits[:, -1:]]
    for token in tokens.split(1, 1):
        logits, cache = engine.decode(token, cache)
        found.append(logits)
    return found


def test_the_next_cache_of_a_size_takes_over_the_recording(ultramem: Any) -> None:
    engine, graphs, eager = ultramem
    for seed, length in enumerate((4, 9, 2)):  # shorter after longer: what is left in the buffers is not looked at
        torch.manual_seed(seed)
        prompt, tokens = (torch.randint(engine.config.vocab_size, (2, size)) for size in (length, PLAIN_RUNS))
        for found, expected in zip(
            logits_after(engine, prompt, tokens), logits_after(eager, prompt, tokens), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        gc.collect()
        assert graphs.recorded == (1 if seed else 0)
    logits_after(engine, prompt[:1], torch.ones(1, PLAIN_RUNS + 1, dtype=torch.int64))
    assert graphs.recorded == 2


def test_few_buffers_are_kept_for_caches_to_come(ultramem: Any) -> None:
    """Of many sizes, those that were used last."""
    engine, graphs, _ = ultramem
    tokens = torch.ones(9, PLAIN_RUNS + 1, dtype=torch.int64)
    for batch in (*range(1, 8), 7):
        logits_after(engine, tokens[:batch, :3], tokens[:batch])
        gc.collect()
    assert graphs.recorded == 7
    held = engine._rooms._held
    assert [each.size[0] for each in held] == [3, 4, 5, 6, 7]
    alive = [engine.prefill(tokens[:batch])[1] for batch in (8, 9)]
    assert [each.size[0] for each in held if not each.is_free] == [cache.mask_BP.shape[0] for cache in alive]


def test_caches_that_live_side_by_side_have_buffers_of_their_own(ultramem: Any) -> None:
    engine, graphs, eager = ultramem
    prompts = torch.randint(engine.config.vocab_size, (2, 2, 5))
    states = [(engine.prefill(prompt)[1], eager.prefill(prompt)[1]) for prompt in prompts]
    for step in range(PLAIN_RUNS + 2):
        token = torch.full((2, 1), step + 1)
        for place, (cache, expected_cache) in enumerate(states):
            logits, cache = engine.decode(token, cache)
            expected, expected_cache = eager.decode(token, expected_cache)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
            states[place] = cache, expected_cache
    assert graphs.recorded == 2


def test_a_cache_is_decoded_from_as_often_as_one_likes(ultramem: Any) -> None:
    engine, _, _ = ultramem
    _, cache = engine.prefill(torch.randint(engine.config.vocab_size, (1, 5)))
    token = torch.ones(1, 1, dtype=torch.int64)
    found, kept = [], []
    for _ in range(PLAIN_RUNS + 3):
        logits, _ = engine.decode(token, cache)
        found.append(logits)
        kept.append(logits.clone())
    assert all(torch.equal(each, kept[0]) for each in kept)
    assert all(torch.equal(each, kept[0]) for each in found)  # not in memory that a replay writes to


def test_a_recorded_step_can_be_run_plainly(ultramem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the memory that it was recorded on, so that a profiler sees the kernels of the recording."""
    engine, graphs, _ = ultramem
    _, cache = engine.prefill(torch.randint(engine.config.vocab_size, (1, 5)))
    token = torch.ones(1, 1, dtype=torch.int64)
    for _ in range(PLAIN_RUNS + 1):
        replayed, _ = engine.decode(token, cache)
    (held,) = engine._rooms._held
    inputs = held.replay._inputs

    def never(self: Any) -> None:
        raise AssertionError("replayed")

    seen = []
    step = held.replay._step
    held.replay._step = lambda *own: (seen.append(own), step(*own))[1]
    with monkeypatch.context() as patched, engine.plain_steps():
        patched.setattr(Recording, "replay", never)
        found, _ = engine.decode(token, cache)
    assert torch.equal(found, replayed)
    assert [[id(each) for each in own] for own in seen] == [[id(each) for each in inputs]]
    again, _ = engine.decode(token, cache)
    assert torch.equal(again, replayed)
    assert (len(seen), graphs.recorded) == (1, 1)


def test_a_step_that_asks_the_host_is_refused() -> None:
    inputs = [torch.ones(2)]
    step = DecodeReplay(lambda x: [x * x.sum().item()], inputs, Graphs(), torch.device("cpu"))
    for _ in range(PLAIN_RUNS):
        step(inputs)
    with pytest.raises(RuntimeError, match="the host reads a value"):
        step(inputs)


def test_there_are_no_graphs_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="replay must be False on a CPU, which records no graphs, got True"):
        CompiledEngine(make_model("dense"), replay=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["dense", "moe", "pkm", "ultramem"])
def test_cuda_graphs_give_the_logits_of_plain_launches(family: str) -> None:
    torch.manual_seed(0)
    model = build_model(FAMILIES[family], device="cuda").eval()
    engine, plain = CompiledEngine(model), CompiledEngine(model, replay=False)
    assert engine._rooms is not None
    for seed in range(2):
        torch.manual_seed(seed)
        prompt, tokens = (torch.randint(model.config.vocab_size, (4, size)) for size in (33, 8))
        for found, expected in zip(
            logits_after(engine, prompt, tokens), logits_after(plain, prompt, tokens), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        gc.collect()
