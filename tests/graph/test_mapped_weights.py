"""Mapped weights are those of the file, cost no memory of the process's own, and refuse files that are not whole."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported import CONFIG, DENSE, MEMORY, build
from mapped import data_bytes, permissions, write_sparse

import ultramem
from ultramem.export.weights_file import write_weights
from ultramem.graph.mapped_weights import map_weights
from ultramem.graph.weights import save_weights, write_config
from ultramem.runtime.engine import open_engine

TOKENS = torch.arange(22).view(2, 11) % 64


@pytest.fixture
def run(tmp_path):
    write_config(tmp_path, CONFIG)
    save_weights(build(CONFIG), tmp_path)
    return tmp_path


@torch.no_grad()
@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_a_mapped_model_computes_the_same_bits(run, engine):
    read, mapped = ultramem.load(run), ultramem.load(run, mmap=True)
    assert permissions(run / "model.safetensors") >= {"r--s"}
    for name, weight in read.state_dict().items():
        assert torch.equal(mapped.state_dict()[name], weight)
    assert not mapped.training
    assert not any(weight.requires_grad for weight in mapped.parameters())
    assert torch.equal(mapped(TOKENS).logits, read(TOKENS).logits)
    both = []
    for model in (read, mapped):
        running = open_engine(engine, model, None)
        logits, cache = running.prefill(TOKENS)
        both.append((logits, running.decode(TOKENS[:, :1], cache)[0]))
    assert torch.equal(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])


def test_a_mapping_outlives_its_file(run):
    mapped = map_weights(run / "model.safetensors")["embedding.weight"]
    save_weights(build(CONFIG).double(), run)  # replaces the file, as all of this package's writers do
    (run / "model.safetensors").unlink()
    assert torch.equal(mapped, build(CONFIG).embedding.weight)


def test_every_type_and_shape_is_mapped(tmp_path):
    tensors = {
        "double": torch.randn(3, 2, dtype=torch.float64),
        "half": torch.randn(5).half(),
        "brain": torch.randn(1, 1, 1).bfloat16(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "small": torch.arange(-3, 4, dtype=torch.int8),
        "long": torch.tensor(2**40),
        "nothing": torch.empty(0, 4),
        "truth": torch.tensor([True, False, True]),
    }
    write_weights(tmp_path / "all.safetensors", tensors, metadata={"from": "a test"})
    mapped = map_weights(tmp_path / "all.safetensors")
    assert mapped.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert mapped[name].dtype == tensor.dtype
        assert torch.equal(mapped[name], tensor)


def test_mapping_adds_nothing_to_the_process_own_memory(tmp_path):
    """64 MB with a hole in the file where the weight is."""
    path, size = tmp_path / "hole.safetensors", 2**26
    write_sparse(path, {"hole": (2**24,)})
    before = data_bytes()
    mapped = map_weights(path)["hole"]
    assert mapped.sum() == 0  # every page has been read
    assert data_bytes() - before < size / 8
    assert permissions(path) == {"r--s"}


def with_header(path: Path, header: object, rest: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (0 if isinstance(header, bytes) else -len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)


@pytest.mark.parametrize(
    ("entry", "rest", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, 7, "should have .* bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, 9, "should have .* bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, 12, "should begin at byte"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, 8, "its header says of weight"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}, 8, "its header says of weight"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, 8, "its header says of weight"),
        ({"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}, 8, "its header says of weight"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, 8, "its header says of weight"),
        ({"shape": [2], "data_offsets": [0, 8]}, 8, "its header says of weight"),
        (None, 8, "its header says of weight"),
        ({"dtype": "F9", "shape": [2], "data_offsets": [0, 8]}, 8, "must be one of F64.*got 'F9'"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, 8, r"must be one of F64.*got \['F32'\]"),
    ],
)
def test_headers_that_do_not_fit_their_file_are_refused(tmp_path, entry, rest, message):
    path = tmp_path / "broken.safetensors"
    with_header(path, {"weight": entry}, b"\0" * rest)
    with pytest.raises(ValueError, match=message):
        map_weights(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "header should take 0 bytes, the file has 0"),
        (b"\xff" * 8, "header should take"),
        ((5).to_bytes(8, "little") + b"{nope", "header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "header is not a JSON object"),
    ],
)
def test_files_without_a_header_are_refused(tmp_path, data, message):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        map_weights(path)


def test_a_weight_that_lies_askew_is_refused(tmp_path):
    path = tmp_path / "askew.safetensors"
    header = {"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    text += b" " * ((1 - 8 - len(text)) % 4)
    with_header(path, text, b"\0" * 4)
    with pytest.raises(ValueError, match="weight must begin at a multiple of 4 bytes"):
        map_weights(path)


def test_load_refuses_what_a_mapping_cannot_give(run):
    with pytest.raises(ValueError, match=r"dtype must be None or that of the file.*float32, got torch.bfloat16"):
        ultramem.load(run, mmap=True, dtype=torch.bfloat16)
    assert ultramem.load(run, mmap=True, dtype=torch.float32).head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="device must be the CPU for weights that are mapped from a file, got cuda"):
        ultramem.load(run, mmap=True, device="cuda")
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="not a whole safetensors file: it should have"):
        ultramem.load(run, mmap=True)
    save_weights(build(DENSE), run)
    with pytest.raises(ValueError, match=r"does not fit"):
        ultramem.load(run, mmap=True)


GENERATE = """
    import json, resource, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    from mapped import data_bytes
    import ultramem
    from ultramem.runtime.engine import open_engine
    from ultramem.runtime.generate import generate

    torch.set_num_threads(1)
    small, large = sys.argv[2:]

    def run(folder, **options):
        engine = open_engine("eager", ultramem.load(folder, **options), None)
        tokens = list(generate(engine, [1, 2, 3], max_new_tokens=12, end_of_text=-1))
        return tokens, engine.prefill(torch.tensor([[1, 2, 3, *tokens]]))[0]

    run(small)  # what the libraries take
    tokens, logits = run(large)
    limit = data_bytes() + 2**26
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        run(large)
        refused = None
    except RuntimeError as error:
        refused = str(error)
    mapped_tokens, mapped_logits = run(large, mmap=True)
    print(json.dumps({
        "limit_bytes": limit,
        "refused": refused,
        "tokens": tokens,
        "mapped_tokens": mapped_tokens,
        "same_logits": torch.equal(logits, mapped_logits),
    }))
"""


def write_large_run(folder: Path) -> int:
    """A run with a table of 512 MB, an eighth of whose rows are not zero; returns its bytes."""
    memory = replace(MEMORY, knum=512, value_dim=512, top_m=16)
    config = replace(CONFIG, memory=memory)
    folder.mkdir()
    write_config(folder, config)
    with torch.device("meta"):
        shapes = {name: tuple(each.shape) for name, each in ultramem.build_model(config).state_dict().items()}
    table = "memories.0.table.values_NV"
    path = folder / "model.safetensors"
    place = write_sparse(path, {table: shapes.pop(table), **shapes})
    table_bytes = 512 * 512 * 512 * 4
    with path.open("r+b") as file:
        for start in range(0, table_bytes, 2**23):
            file.seek(place + start)
            file.write(torch.randn(2**18).numpy().data)
        file.seek(place + table_bytes)
        for shape in shapes.values():
            file.write((0.3 * torch.randn(shape)).contiguous().numpy().data)
    return table_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux")
def test_a_table_larger_than_the_memory_of_the_process_generates(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    write_config(small, CONFIG)
    save_weights(build(CONFIG), small)
    table_bytes = write_large_run(large)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(GENERATE), str(Path(__file__).parents[1]), str(small), str(large)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["limit_bytes"] < table_bytes
    assert "Cannot allocate memory" in result["refused"]
    assert result["mapped_tokens"] == result["tokens"]
    assert len(set(result["tokens"])) > 1
    assert result["same_logits"]
