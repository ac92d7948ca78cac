"""Four engines, one answer."""

import pytest
import torch
from exported import CONFIG, DENSE, build, export_once, once

from ultramem.export import ExportOptions, export_model
from ultramem.runtime.engine import ENGINES, AotEngine, CompiledEngine, EagerEngine, OnnxEngine, open_engine
from ultramem.runtime.model_engine import GROWTH, pack, unpack

STEPS = 32


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


@pytest.fixture(scope="module")
def warm(model, tmp_path_factory):
    """Warm for one sequence and for several."""
    torch._dynamo.reset()
    engine = CompiledEngine(model)
    with once(tmp_path_factory, "compile"):  # another worker then finds the native code in the compiler's cache
        for batch in (1, 3):
            _, cache = engine.prefill(torch.ones(batch, 5, dtype=torch.int64))
            engine.decode(torch.ones(batch, 1, dtype=torch.int64), cache)
    return engine


@pytest.fixture
def compiled(warm):
    """In every test, each further graph is an error."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield warm


@pytest.fixture(params=["eager", "compile", "onnx", "aoti"])
def engine(request, model, tmp_path_factory):
    if request.param == "eager":
        return EagerEngine(model)
    if request.param == "compile":
        return request.getfixturevalue("compiled")
    return open_engine(request.param, None, export_once(tmp_path_factory, request.param))


def greedy(engine, tokens, mask=None):
    """STEPS tokens [B,STEPS], and the logits of every position [B,S+STEPS-1,V]."""
    logits, cache = engine.prefill(tokens, mask)
    new, pieces = [logits[:, -1:].argmax(-1)], [logits]
    for _ in range(STEPS - 1):
        logits, cache = engine.decode(new[-1], cache)
        new.append(logits.argmax(-1))
        pieces.append(logits)
    return torch.cat(new, 1), torch.cat(pieces, 1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 7, 33])
def test_greedy_tokens_and_logits_are_those_of_the_full_forward(engine, model, batch, length):
    prompt = torch.randint(64, (batch, length))
    with torch.no_grad():
        tokens = prompt
        for _ in range(STEPS):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
        expected = model(tokens[:, :-1]).logits
        exact = build(CONFIG).double()(tokens[:, :-1]).logits
    new, logits = greedy(engine, prompt)
    assert new.equal(tokens[:, length:])
    assert (logits - expected).abs().max() <= 4 * (expected - exact).abs().max()


def test_padded_prompts_decode_as_if_alone(engine, model):
    prompt = torch.randint(64, (3, 9))
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    mask[2, :8] = 0
    new, _ = greedy(engine, prompt, mask)
    for row, padding in ((0, 4), (1, 0), (2, 8)):
        alone, _ = greedy(EagerEngine(model), prompt[row : row + 1, padding:])
        assert new[row : row + 1].equal(alone)


@pytest.mark.parametrize("length", [1, 4])
def test_decode_takes_a_mask_over_all_tokens(engine, length):
    prompt = torch.randint(64, (1, length))
    _, cache = engine.prefill(prompt)
    token = torch.tensor([[3]])
    whole, _ = engine.decode(token, cache, torch.ones(1, length + 1, dtype=torch.int64))
    default, _ = engine.decode(token, cache)  # the cache of the first call is still good
    assert whole.equal(default)


def test_a_cache_that_was_overwritten_is_refused(compiled):
    """Steps in place go on from any cache, and what came of it before is gone."""
    prompt = torch.randint(64, (1, 5))
    _, cache = compiled.prefill(prompt)
    expected, first = compiled.decode(torch.tensor([[3]]), cache)
    _, second = compiled.decode(torch.tensor([[4]]), cache)
    with pytest.raises(ValueError, match="cache was overwritten: an earlier cache of the same sequences"):
        compiled.decode(torch.tensor([[5]]), first)
    compiled.decode(torch.tensor([[5]]), second)
    again, _ = compiled.decode(torch.tensor([[3]]), cache)
    assert again.equal(expected)


def test_a_cache_grows_past_its_room(compiled, model):
    prompt = torch.randint(64, (1, GROWTH - 3))
    _, cache = compiled.prefill(prompt)
    tokens = torch.randint(64, (1, 8))
    pieces = []
    for token in tokens[0]:
        logits, cache = compiled.decode(token.view(1, 1), cache)
        pieces.append(logits)
    with torch.no_grad():
        expected = model(torch.cat([prompt, tokens], 1)).logits[:, prompt.shape[1] :]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-5, atol=1e-5)


def test_no_recompile_over_lengths_after_the_warm_up(compiled):
    # 4096 tokens are where Inductor's CPU code splits its loops.
    for batch, length in ((3, 1), (1, 1), (1, 2), (1, 60), (2, 6), (5, 61), (1, 4100), (3, 1500)):
        _, cache = compiled.prefill(torch.ones(batch, length, dtype=torch.int64))
        for _ in range(3):
            _, cache = compiled.decode(torch.ones(batch, 1, dtype=torch.int64), cache)


def test_tokens_that_come_in_one_copy_compile_as_those_of_their_own(model, warm):
    """As they reach a GPU."""
    engine = CompiledEngine(model)
    engine._packs = True
    for batch in (1, 3):
        prompt, token = torch.randint(61, (batch, 8)), torch.randint(61, (batch, 1))
        for length in (8, 5, 2):
            with torch._dynamo.config.patch(error_on_recompile=length < 8):
                (logits, cache), (expected, plain) = (each.prefill(prompt[:, :length]) for each in (engine, warm))
                assert torch.equal(logits, expected)
                for _ in range(2):
                    (logits, cache), (expected, plain) = engine.decode(token, cache), warm.decode(token, plain)
                    assert torch.equal(logits, expected)


def test_packed_tensors_begin_at_multiples_of_16_bytes():
    tensors = [torch.arange(3).view(3, 1), torch.arange(10).view(2, 5), torch.tensor([7]), torch.arange(4)]
    found = unpack(pack(tensors), [each.shape for each in tensors])
    assert all(torch.equal(each, tensor) for each, tensor in zip(found, tensors, strict=True))
    assert all(each.storage_offset() % 2 == 0 for each in found)
    assert len({each.untyped_storage().data_ptr() for each in found}) == 1


def test_slices_of_one_sequence_compile_nothing_anew(compiled):
    """They are contiguous to PyTorch, with the strides of what they were cut from."""
    tokens = torch.ones(1, 9, dtype=torch.int64)
    prompt, token = tokens[:, :-1], tokens[:, -1:]
    assert (prompt.stride(), token.stride()) == ((9, 1), (9, 1))
    _, cache = compiled.prefill(prompt)
    _, cache = compiled.decode(token, cache)
    compiled.decode(token, cache)


def test_engines_of_one_process_do_not_use_up_each_others_graphs(model):
    """The compiler limits graphs per code object."""
    engines = [CompiledEngine(model) for _ in range(3)]
    assert len({engine._decode_graph.__wrapped__.__code__ for engine in engines}) == 1  # equal
    assert len({id(engine._decode_graph.__wrapped__.__code__) for engine in engines}) == 3  # but not the same


def test_arguments_are_checked(model):
    engine = EagerEngine(model)
    with pytest.raises(ValueError, match=r"must have shape \[B,S\] with at least one token, got \(1, 0\)"):
        engine.prefill(torch.empty(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must be an int64 tensor, got torch\.int32"):
        engine.prefill(torch.ones(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(1, 2\), got \(1, 3\)"):
        engine.prefill(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 3))
    _, cache = engine.prefill(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must have shape \(2, 1\), a token per sequence, got \(1, 1\)"):
        engine.decode(torch.ones(1, 1, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 3\), got \(2, 2\)"):
        engine.decode(torch.ones(2, 1, dtype=torch.int64), cache, torch.ones(2, 2))


def test_tokens_outside_of_the_vocabulary_are_refused(model, tmp_path_factory):
    """Native code would read past the embedding."""
    for engine in (EagerEngine(model), open_engine("onnx", None, export_once(tmp_path_factory, "onnx"))):
        _, cache = engine.prefill(torch.ones(1, 2, dtype=torch.int64))
        for token in (64, -1):
            with pytest.raises(ValueError, match=rf"input_ids must be tokens in 0\.\.63, got {token}"):
                engine.prefill(torch.tensor([[0, token]]))
            with pytest.raises(ValueError, match=rf"input_ids must be tokens in 0\.\.63, got {token}"):
                engine.decode(torch.tensor([[token]]), cache)


def test_an_export_in_half_precision_that_takes_single_tokens(tmp_path):
    model = build(DENSE)
    export_model(model, "onnx", tmp_path / "out", options=ExportOptions(dtype="fp16", decode=True))
    engine = open_engine("onnx", None, tmp_path / "out")
    prompt = torch.arange(10).view(2, 5)
    logits, cache = engine.prefill(prompt)
    assert logits.dtype == torch.float32
    more, _ = engine.decode(prompt[:, :1], cache)
    with torch.no_grad():
        expected = model(torch.cat([prompt, prompt[:, :1]], 1)).logits
    # Half precision of logits of size 3: a few times 2^-11 * 3.
    torch.testing.assert_close(torch.cat([logits, more], 1), expected, rtol=0, atol=0.02)


def test_an_export_of_a_fixed_size_takes_prompts_of_whole_pieces(tmp_path):
    model = build(DENSE)
    export_model(model, "onnx", tmp_path / "out", options=ExportOptions(static=(1, 4)))
    engine = open_engine("onnx", None, tmp_path / "out")
    prompt = torch.arange(8).view(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(engine.prefill(prompt)[0], model(prompt).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="the export takes 4 tokens at a time, got a prompt of 7"):
        engine.prefill(prompt[:, :7])


def test_open_engine(model, tmp_path, tmp_path_factory):
    assert open_engine("eager", model, None).name == "eager"
    assert open_engine("compile", model, None).name == "compile"
    assert isinstance(open_engine("onnx", None, export_once(tmp_path_factory, "onnx")), OnnxEngine)
    with pytest.raises(ValueError, match="engine must be one of eager, compile, onnx, aoti, tensorrt, got 'tflite'"):
        open_engine("tflite", model, None)
    for name in ENGINES[:2]:
        with pytest.raises(ValueError, match="runs a model, got None"):
            open_engine(name, None, tmp_path)
    for name in ENGINES[2:]:
        with pytest.raises(ValueError, match="runs an export: give its folder"):
            open_engine(name, model, None)
    with pytest.raises(FileNotFoundError, match="is not an export folder"):
        open_engine("aoti", None, tmp_path)
    with pytest.raises(ValueError, match="is an export for onnx, not for aoti"):
        AotEngine(export_once(tmp_path_factory, "onnx"))
    with pytest.raises(ValueError, match="eval mode"):
        EagerEngine(build(CONFIG).train())


def test_tensorrt_is_opened_from_an_export_and_names_what_is_missing(model, tmp_path):
    with pytest.raises(ValueError, match=r"engine 'tensorrt' runs an export: give its folder \(ultramem export --to"):
        open_engine("tensorrt", model, None)
    with pytest.raises(FileNotFoundError, match="is not an export folder"):
        open_engine("tensorrt", None, tmp_path)
