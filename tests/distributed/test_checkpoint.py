"""Checkpoints of several ranks: whole or absent, and read by any number of ranks, under any placement."""

import resource
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh

from ultramem import MemoryConfig, ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from ultramem.graph import build_model
from ultramem.graph import weights as whole_weights
from ultramem.graph.sharded_weights import write_parts
from ultramem.graph.value_table import ValueTable
from ultramem.runtime import train_step
from ultramem.runtime.data import load_corpus
from ultramem.runtime.distributed import ALONE, Ranks, ShardedLoss
from ultramem.runtime.distributed.checkpoint import CheckpointWriter, load_newest, start_states, whole_state
from ultramem.runtime.optimizers import make_optimizers
from ultramem.runtime.run import RunFolder
from ultramem.runtime.train import train
from ultramem.runtime.weights import load_weights, save_weights

MODEL = ModelConfig(
    vocab_size=257,
    hidden_size=32,
    inner_size=48,
    num_heads=2,
    num_layers=2,
    dropout=0.0,
    # 49 rows: no number of ranks divides them.
    memory=MemoryConfig(hidden_size=32, num_layers=2, value_dim=16, key_dim=8, knum=7, top_m=4),
    insertions="1:2",
)
WITH_EXPERTS = replace(MODEL, moe=MoEConfig(num_experts=4))
TRAIN = TrainConfig(
    steps=6,
    batch_size=4,
    sequence_length=16,
    compile=False,
    checkpoint_every=3,
    eval_every=0,
    health_every=3,
    final_eval_tokens=64,
)
ALL_WHOLE = ParallelConfig(table_placement="replicate")
ROWS = ParallelConfig(table_placement="rows", pool="home")
COLUMNS = ParallelConfig(table_placement="columns", pool="home")


class PulledThePlugError(Exception):
    """Ends a run between two steps."""


def make_ranks(parallel):
    size = dist.get_world_size()
    if size == 1:
        return ALONE
    mesh = init_device_mesh(
        "cpu", (parallel.table_copies, size // parallel.table_copies), mesh_dim_names=("copies", "shards")
    )
    return Ranks(rank=dist.get_rank(), size=size, device=torch.device("cpu"), mesh=mesh, parallel=parallel)


def train_part(text, out, table_optimizer, parallel, until, model=MODEL):
    """Train, from the newest checkpoint if there is one, and lose all that came after step `until`'s checkpoint."""
    config = replace(TRAIN, table_optimizer=table_optimizer, parallel=parallel)
    read = train_step.training_batch

    def training_batch(*args, step, **rest):
        if step == until + 1:
            raise PulledThePlugError
        return read(*args, step=step, **rest)

    train_step.training_batch = training_batch
    try:
        train(model, config, load_corpus(text), Path(out), resume=True, ranks=make_ranks(parallel))
    except PulledThePlugError:
        pass
    finally:
        train_step.training_batch = read


def rows_of(out):
    return RunFolder(Path(out)).read_metrics()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It is a truth universally acknowledged. " * 40)
    return str(path)


@pytest.fixture(scope="module")
def whole_run(ranks, text, tmp_path_factory):
    """The folder of a run of one process that nothing happens to, by the optimiser of its tables and its model."""
    folders = {}

    def folder(table_optimizer, model=MODEL):
        key = table_optimizer, model
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("whole") / "run"
            ranks(1).run(train_part, text, str(folders[key]), table_optimizer, ALL_WHOLE, TRAIN.steps, model)
        return folders[key]

    return folder


@pytest.mark.parametrize(
    ("table_optimizer", "before", "after"),
    [
        ("lazy_adamw", (2, ROWS), (1, ALL_WHOLE)),
        ("adamw", (1, ALL_WHOLE), (2, ROWS)),
        ("row_adagrad", (2, ROWS), (4, ROWS)),
        ("row_adagrad", (4, replace(ROWS, table_copies=2)), (1, ALL_WHOLE)),
        ("lazy_adamw", (2, ROWS), (2, COLUMNS)),
        ("adamw", (2, COLUMNS), (2, replace(ROWS, pool="owner"))),
        ("lazy_adamw", (4, COLUMNS), (2, ROWS)),
        ("lazy_adamw", (2, replace(ROWS, dense="fsdp")), (2, ALL_WHOLE)),
        ("adamw", (1, ALL_WHOLE), (2, replace(COLUMNS, dense="fsdp"))),
        ("lazy_adamw", (2, replace(ROWS, expert_parallel=True)), (1, ALL_WHOLE)),
        ("adamw", (2, ROWS), (4, replace(ROWS, expert_parallel=True))),
        ("lazy_adamw", (2, replace(ROWS, expert_parallel=True, dense="fsdp")), (2, COLUMNS)),
    ],
)
def test_a_run_goes_on_under_other_ranks(ranks, whole_run, text, tmp_path, table_optimizer, before, after):
    out = tmp_path / "run"
    model = WITH_EXPERTS if before[1].expert_parallel or after[1].expert_parallel else MODEL
    for (size, parallel), until in ((before, 3), (after, TRAIN.steps)):
        ranks(size).run(train_part, text, str(out), table_optimizer, parallel, until, model)
        assert (out / f"checkpoints/step-{until:08d}.json").is_file()
    expected, found = rows_of(whole_run(table_optimizer, model)), rows_of(out)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (theirs["step"], name)
        for name in ("reads", "used_lately", "used_ever"):  # counts that a checkpoint carries too
            assert ours.get(name) == theirs.get(name)
    ours, theirs = (whole_weights.load(each).state_dict() for each in (out, whole_run(table_optimizer, model)))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def cut_model(parallel, seed):
    torch.manual_seed(seed)
    ranks = make_ranks(parallel)
    model = build_model(MODEL, shard=ranks.table_shard())
    if parallel.dense == "fsdp":
        ShardedLoss(model, lambda inputs, targets: (inputs, targets), ranks)
    return model, ranks


def write_weights(folder, parallel):
    model, ranks = cut_model(parallel, 0)
    save_weights(model, Path(folder), ranks)


def weights_that_were_read(folder, parallel):
    model, _ = cut_model(parallel, 1)
    load_weights(model, Path(folder) / "model.safetensors")
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("parallel", [ROWS, replace(ROWS, dense="fsdp"), replace(COLUMNS, table_copies=2)])
def test_one_safetensors_file_is_that_of_one_process(ranks, tmp_path, parallel):
    torch.manual_seed(0)
    model = build_model(MODEL)
    (tmp_path / "parts").mkdir()
    whole_weights.save_weights(model, tmp_path)
    ranks(4).run(write_weights, str(tmp_path / "parts"), parallel)
    written = tmp_path / "parts/model.safetensors"
    assert written.read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["model.safetensors"]
    for seen in ranks(4).run(weights_that_were_read, str(tmp_path), parallel):
        for name, tensor in model.state_dict().items():
            assert torch.equal(seen[name], tensor), name


def test_the_layout_of_a_file_is_safetensors_own(tmp_path):
    tensors = {
        f"{letter}.{dtype}": torch.ones(3, dtype=dtype)
        for dtype in (
            torch.bool, torch.uint8, torch.float16, torch.bfloat16,
            torch.int32, torch.float32, torch.float64, torch.int64,
        )
        for letter in "ba"
    } | {"scalar": torch.ones(())}  # fmt: skip
    save_file(tensors, tmp_path / "theirs")
    write_parts(tmp_path / "ours", tensors, is_main=True, wait=lambda: None)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def save_while_weights_change(folder, parallel):
    model, ranks = cut_model(parallel, 0)
    writer = CheckpointWriter(Path(folder), "fingerprint", keep=1, ranks=ranks)
    write = FileSystemWriter.write_data
    changed = []

    def write_data(self, plan, planner):
        while not changed:  # the copy was taken, and nothing is on disk
            pass
        return write(self, plan, planner)

    FileSystemWriter.write_data = write_data
    expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    try:
        writer.save(1, whole_state(model, [], {}))
        assert not list(Path(folder).glob("*.json"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        changed.append(True)
        writer.wait()
    finally:
        FileSystemWriter.write_data = write
    assert load_newest(Path(folder), "fingerprint", model, [], {}) == 1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("parallel", [ROWS, COLUMNS])
def test_steps_after_a_save_began_are_not_in_it(ranks, tmp_path, parallel):
    ranks(2).run(save_while_weights_change, str(tmp_path), parallel)


def error_of_a_failed_save(folder):
    model, ranks = cut_model(ROWS, 0)
    writer = CheckpointWriter(Path(folder), "fingerprint", keep=1, ranks=ranks)
    write = FileSystemWriter.write_data

    def write_data(self, plan, planner):
        if ranks.rank == 1:
            raise OSError("No space left on device")
        return write(self, plan, planner)

    FileSystemWriter.write_data = write_data
    try:
        writer.save(5, whole_state(model, [], {}))
        writer.wait()
    except OSError as error:
        return str(error)
    finally:
        FileSystemWriter.write_data = write
    return None


def test_a_part_that_cannot_be_written_is_everybodys_error(ranks, tmp_path):
    errors = ranks(2).run(error_of_a_failed_save, str(tmp_path))
    assert errors == ["the checkpoint of step 5 could not be written: rank 1: No space left on device"] * 2
    assert not list(tmp_path.glob("*.json"))


LARGE = replace(MODEL, memory=replace(MODEL.memory, knum=512, value_dim=768))
TABLE_BYTES = 512**2 * 768 * 4
# Saving takes three parts of the table's four (the part, its copy, what torch.save hands to the file), and stacks and
# arenas of threads 40 MiB: of a smaller table the eighth between them would be too little.
ALLOWANCE_BYTES = TABLE_BYTES * 7 // 8


@contextmanager
def allowance(size):
    """The process may take `size` bytes more than it has."""
    had = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (had * 1024 + size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def table_of(model):
    return next(module for module in model.modules() if isinstance(module, ValueTable)).values_NV


def large_model(parallel):
    ranks = make_ranks(parallel)
    torch.manual_seed(0)
    return build_model(LARGE, shard=ranks.table_shard()), ranks


def sum_of(model):
    """Of the rows, a part at a time."""
    return sum(rows.double().sum(dim=0) for rows in table_of(model).split(2**14))


def check_reading(model, load):
    expected = sum_of(model)
    table_of(model).data.zero_()
    load()
    assert torch.equal(sum_of(model), expected)


def all_that_is_done_with_a_table(folder):
    with allowance(ALLOWANCE_BYTES):
        with pytest.raises((RuntimeError, MemoryError)):
            build_model(LARGE)
        model, ranks = large_model(ROWS)
        writer = CheckpointWriter(Path(folder), "fingerprint", keep=1, ranks=ranks)
        optimizers = make_optimizers(model, replace(TRAIN, table_optimizer="row_adagrad"))
        start_states(optimizers)
        writer.save(1, whole_state(model, optimizers, {}))
        writer.wait()
        save_weights(model, Path(folder), ranks)
        check_reading(model, partial(load_newest, Path(folder), "fingerprint", model, optimizers, {}))
        check_reading(model, partial(load_weights, model, Path(folder) / "model.safetensors"))
        del model, optimizers
        model, _ = large_model(COLUMNS)
        check_reading(model, partial(load_weights, model, Path(folder) / "model.safetensors"))


def error_of_a_damaged_part(folder):
    model, ranks = cut_model(ROWS, 0)
    writer = CheckpointWriter(Path(folder), "fingerprint", keep=1, ranks=ranks)
    writer.save(1, whole_state(model, [], {}))
    writer.wait()
    ranks.on_main(lambda: (Path(folder) / "step-00000001/__1_0.distcp").write_bytes(b"something else"))
    try:
        load_newest(Path(folder), "fingerprint", model, [], {})
    except ValueError as error:
        return str(error)
    return None


def test_a_damaged_part_is_refused_by_all(ranks, tmp_path):
    for error in ranks(2).run(error_of_a_damaged_part, str(tmp_path)):
        assert error.startswith(f"checkpoint {tmp_path}/step-00000001 cannot be read: rank ")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the size of a process under /proc")
def test_no_rank_ever_holds_the_whole_table(ranks, tmp_path):
    ranks(4).run(all_that_is_done_with_a_table, str(tmp_path))
