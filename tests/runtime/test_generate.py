"""Requests of different lengths in one batch: each comes out as if it were alone."""

import gc
import resource
from dataclasses import replace

import pytest
import torch
from exported import CONFIG, DENSE, build, export_once

from ultramem.export import ExportOptions, export_model
from ultramem.presets import preset
from ultramem.runtime.engine import EagerEngine, open_engine
from ultramem.runtime.engine_cache import cache_bytes_per_token
from ultramem.runtime.generate import Generator, Request, generate
from ultramem.runtime.tokenizer import ByteTokenizer

PROMPTS = ((3,), (1, 2, 3, 4, 5), (9,) * 17, (60, 2, 31), tuple(range(40)))
STEPS = 12


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


def greedy_alone(model, prompt, steps=STEPS):
    """Without a cache: the whole text anew for each token."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(steps):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tuple(tokens[0, len(prompt) :].tolist())


def requests(steps=STEPS, **options):
    return [Request(prompt=prompt, max_new_tokens=steps, **options) for prompt in PROMPTS]


def tokens_of(generator, wanted):
    return [each.tokens for each in generator.complete(wanted)]


@pytest.mark.parametrize("max_batch", [1, 2, 5])
def test_greedy_tokens_are_those_of_each_prompt_alone(model, max_batch):
    """With two at a time, a prompt joins where another has ended, which took fewer tokens."""
    wanted = [replace(each, max_new_tokens=4 + 2 * index) for index, each in enumerate(requests())]
    found = tokens_of(Generator(EagerEngine(model), max_batch=max_batch), wanted)
    assert found == [greedy_alone(model, each.prompt, each.max_new_tokens) for each in wanted]


def test_sampled_tokens_do_not_depend_on_the_batch(model):
    wanted = [replace(each, seed=index) for index, each in enumerate(requests(temperature=1.5, top_p=0.95))]
    together = tokens_of(Generator(EagerEngine(model), max_batch=3), wanted)
    alone = [tokens_of(Generator(EagerEngine(model)), [each])[0] for each in wanted]
    assert together == alone
    assert together != tokens_of(Generator(EagerEngine(model)), [replace(each, seed=9) for each in wanted])
    assert together[0] == tuple(
        generate(EagerEngine(model), PROMPTS[0], max_new_tokens=STEPS, temperature=1.5, top_p=0.95, seed=0)
    )


def check_engines(model, exported):
    """`exported` gives the folder of an engine's export."""
    expected = [greedy_alone(model, prompt) for prompt in PROMPTS]
    sampled = None
    for name in ("eager", "compile", "onnx", "aoti"):
        engine = open_engine(name, model, None if name in ("eager", "compile") else exported(name))
        for max_batch in (1, 3):
            generator = Generator(engine, max_batch=max_batch)
            assert tokens_of(generator, requests()) == expected, (engine.name, max_batch)
        drawn = tokens_of(Generator(engine), requests(temperature=1.0, top_p=0.9, seed=4))
        assert drawn == (sampled := sampled or drawn), engine.name


def test_every_engine_gives_the_same_tokens(model, tmp_path_factory):
    check_engines(model, lambda engine: export_once(tmp_path_factory, engine))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dense", "moe", "pkm", "ultramem"])
def test_every_engine_gives_the_same_tokens_for_the_tiny_presets(tmp_path, family):
    model = build(preset(f"{family}-tiny"))

    def exported(engine):
        export_model(model, engine, tmp_path / engine)
        return tmp_path / engine

    check_engines(model, exported)


def test_an_engine_of_a_fixed_batch(tmp_path, model):
    export_model(model, "onnx", tmp_path / "out", options=ExportOptions(static=(3, 1), decode=True))
    generator = Generator(open_engine("onnx", None, tmp_path / "out"))
    assert generator.max_batch == 3
    assert tokens_of(generator, requests()) == [greedy_alone(model, prompt) for prompt in PROMPTS]


def test_an_engine_that_takes_no_single_tokens_is_refused(tmp_path):
    export_model(build(DENSE), "onnx", tmp_path / "out", options=ExportOptions(static=(1, 4)))
    with pytest.raises(ValueError, match="must take single tokens to generate, its graph takes 4 at a time"):
        Generator(open_engine("onnx", None, tmp_path / "out"))


def test_a_cancelled_request_leaves_the_others_as_they_were(model):
    generator = Generator(EagerEngine(model), max_batch=2)
    ids = [generator.submit(each) for each in requests()]
    found = {each: [] for each in ids}
    reasons = {}
    for event in generator.run():
        if event.token is not None:
            found[event.request_id].append(event.token)
        reasons[event.request_id] = event.finish_reason
        if len(found[ids[0]]) == 5:
            generator.cancel(ids[0])  # runs
            generator.cancel(ids[4])  # waits
            generator.cancel(99)
    expected = [greedy_alone(model, prompt) for prompt in PROMPTS]
    assert reasons == {ids[0]: "cancelled", ids[4]: "cancelled", **dict.fromkeys(ids[1:4], "length")}
    assert found[ids[4]] == []
    assert 5 <= len(found[ids[0]]) < STEPS
    assert tuple(found[ids[0]]) == expected[0][: len(found[ids[0]])]
    assert [tuple(found[each]) for each in ids[1:4]] == expected[1:4]
    assert generator.num_running == generator.num_waiting == 0


def test_a_stream_may_be_left_and_taken_up_again(model):
    generator = Generator(EagerEngine(model))
    ids = [generator.submit(each) for each in requests()]
    found = {each: [] for each in ids}
    for stop_after in (1, 2, 3, 17, 1000):
        stream = generator.run()
        for _, event in zip(range(stop_after), stream, strict=False):
            found[event.request_id].append(event.token)
        stream.close()
    assert [tuple(found[each]) for each in ids] == [greedy_alone(model, prompt) for prompt in PROMPTS]


def test_complete_keeps_the_events_of_others(model):
    generator = Generator(EagerEngine(model))
    first = generator.submit(requests()[0])
    stream = generator.run()
    tokens = [next(stream).token]
    assert tokens_of(generator, requests()[1:3]) == [greedy_alone(model, prompt) for prompt in PROMPTS[1:3]]
    tokens += [event.token for event in generator.run() if event.request_id == first]
    assert tuple(tokens) == greedy_alone(model, PROMPTS[0])


def test_a_call_that_fails_may_be_repeated(model):
    class Fragile(EagerEngine):
        calls = 0

        def _call(self, *inputs):
            self.calls += 1
            if self.calls % 3 == 0:
                raise RuntimeError("out of memory")
            return super()._call(*inputs)

    generator = Generator(Fragile(model), max_batch=2)
    ids = [generator.submit(each) for each in requests()]
    found = {each: [] for each in ids}
    failures = 0
    while generator.num_running or generator.num_waiting:
        try:
            for event in generator.run():
                found[event.request_id].append(event.token)
        except RuntimeError:
            failures += 1
    assert failures > 10
    assert [tuple(found[each]) for each in ids] == [greedy_alone(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ()}, "prompt must hold at least one token, got none"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, r"temperature must be at least 0 and finite, got -1\.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
        ({"stop": ("",)}, "stop must be texts of at least one character"),
        ({"stop": "word"}, "stop must be texts of at least one character, got 'word'"),
        ({"stop": ("a",)}, "stop needs a tokenizer, the generator has none"),
        ({"prompt": (1, 64)}, r"prompt must be of tokens in 0\.\.63, got 64"),
        ({"max_new_tokens": 4096}, r"prompt and max_new_tokens must fit 4096 positions, got 1 \+ 4096"),
        ({"max_new_tokens": 200}, r"must fit max_cache_bytes 40,000, got 201 tokens of 512 bytes: 102,912"),
    ],
)
def test_a_malformed_request_is_refused_and_nothing_is_lost(model, fields, message):
    generator = Generator(EagerEngine(model), max_cache_bytes=40_000)
    running = generator.submit(requests()[0])
    stream = generator.run()
    tokens = [next(stream).token]
    with pytest.raises(ValueError, match=message):
        generator.submit(Request(**{"prompt": (1,), "max_new_tokens": 1, **fields}))
    tokens += [event.token for event in stream if event.request_id == running]
    assert tuple(tokens) == greedy_alone(model, PROMPTS[0])


def test_complete_queues_all_or_none(model):
    generator = Generator(EagerEngine(model))
    with pytest.raises(ValueError, match="got 64"):
        generator.complete([*requests(), Request(prompt=(64,), max_new_tokens=1)])
    assert generator.num_waiting == 0


def test_arguments_of_a_generator_are_checked(model):
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        Generator(EagerEngine(model), max_batch=0)
    with pytest.raises(ValueError, match="max_cache_bytes must be at least 1 or None, got 0"):
        Generator(EagerEngine(model), max_cache_bytes=0)


def test_keys_and_values_stay_within_their_bytes(model):
    limit = 100 * cache_bytes_per_token(CONFIG, torch.float32)
    most = 0

    class Watched(EagerEngine):
        def _call(self, *inputs):
            nonlocal most
            outputs = super()._call(*inputs)
            most = max(most, sum(each.nbytes for each in outputs[1 : 1 + 2 * CONFIG.num_layers]))
            return outputs

    generator = Generator(Watched(model), max_cache_bytes=limit)
    wanted = requests()
    assert sum(each.num_positions for each in wanted) > 100  # they do not fit together
    assert tokens_of(generator, wanted) == [greedy_alone(model, prompt) for prompt in PROMPTS]
    assert limit / 3 < most <= limit


def test_an_end_of_text_token_ends_a_continuation(model):
    expected = greedy_alone(model, PROMPTS[1])
    last = next(index for index in range(2, STEPS) if expected[index] not in expected[:index])
    generator = Generator(EagerEngine(model), end_of_text=expected[last])
    (completion,) = generator.complete(requests()[1:2])
    assert completion.tokens == expected[:last]
    assert completion.finish_reason == "end_of_text"


def test_stop_texts_end_a_continuation(model):
    tokenizer = ByteTokenizer()
    whole = tokenizer.decode(greedy_alone(model, PROMPTS[1]))
    stop = whole[5:8]
    generator = Generator(EagerEngine(model), tokenizer=tokenizer)
    first, second = generator.complete([replace(requests()[1], stop=("no such text", stop)), requests()[1]])
    assert first.finish_reason == "stop"
    assert first.text == whole[: whole.index(stop)]
    assert tokenizer.decode(first.tokens) == whole[: whole.index(stop) + 3]
    assert second.finish_reason == "length"
    assert second.text == whole


def test_two_hundred_generations_leave_nothing_behind(model):
    """Live tensors and other objects are counted; resident memory may grow by what an allocator keeps."""
    generator = Generator(EagerEngine(model), max_batch=3)

    def some(times):
        for index in range(times):
            stream_ids = [generator.submit(each) for each in requests(3)]
            for event in generator.run():
                if index % 5 == 0 and event.request_id == stream_ids[1]:
                    generator.cancel(event.request_id)
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(issubclass(type(each), torch.Tensor) for each in objects)
        return tensors, len(objects), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    tensors, objects, resident_bytes = some(20)
    tensors_after, objects_after, resident_bytes_after = some(200)
    assert tensors_after == tensors
    assert objects_after - objects < 100  # an object a request would be 1000
    assert resident_bytes_after - resident_bytes < 8e6
