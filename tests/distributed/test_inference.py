"""Models in parts that several ranks run together on the same tokens: logits and tokens of one process."""

import itertools
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES
from mapped import data_bytes
from torch.distributed.device_mesh import init_device_mesh

import ultramem
from ultramem.graph import build_model
from ultramem.graph.same_tokens_table import SameTokensTable
from ultramem.graph.table_shard import TableShard
from ultramem.graph.value_table import ValueTable
from ultramem.graph.weights import save_weights, write_config
from ultramem.runtime.distributed.inference import inference_ranks, require_model_engine
from ultramem.runtime.distributed.ranks import Ranks
from ultramem.runtime.engine import open_engine
from ultramem.runtime.generate import Generator, Request
from ultramem.runtime.tokenizer import load_tokenizer

PLACEMENTS = "rows", "columns"
MEMORIES = [name for name, config in FAMILIES.items() if config.memory is not None]
SPREAD = 10.0  # of the table's rows: those of a fresh model hardly move a logit


def make_shard(placement, **fields):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return TableShard(placement=placement, mesh=mesh, tokens="same", **fields)


def make_models(config, placement, dtype=None):
    """One model with whole tables, and one with this rank's parts, of the same weights."""
    models = []
    for shard in (None, make_shard(placement)):
        torch.manual_seed(0)
        models.append(build_model(config, dtype=dtype, shard=shard).eval().requires_grad_(False))
        for module in models[-1].modules():
            if isinstance(module, ValueTable):
                module.values_NV.mul_(SPREAD)
    return models


def ranks_of_group():
    return Ranks(rank=dist.get_rank(), size=dist.get_world_size())


def largest_difference(config, placement):
    whole, parts = make_models(config, placement, torch.float64)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (2, 7), generator=generator)
    difference, cache = 0.0, None
    for piece in tokens.split([6, 1], dim=1):
        expected = whole(piece, cache=cache)
        found = parts(piece, cache=cache)
        cache = expected.cache
        difference = max(difference, float((expected.logits - found.logits).abs().max()))
    without = [module for module in parts.modules() if isinstance(module, SameTokensTable)]
    for table in without:
        table.values_NV.zero_()
    changed = float((parts(tokens).logits - whole(tokens).logits).abs().max())
    return difference, changed


@pytest.mark.parametrize(
    ("family", "placement", "size"),
    [(*pair, (2, 4)[index % 3 == 2]) for index, pair in enumerate(itertools.product(MEMORIES, PLACEMENTS))],
)
def test_logits_are_those_of_one_process(ranks, family, placement, size):
    for difference, changed in ranks(size).run(largest_difference, FAMILIES[family], placement):
        assert difference < 1e-12
        assert changed > 1e-4


PROMPTS = (1, 2, 3, 4, 5), (7, 7)
ASKED = [
    Request(prompt=PROMPTS[0], max_new_tokens=6),
    Request(prompt=PROMPTS[1], max_new_tokens=9, temperature=1.0, top_p=0.9, seed=3),
    Request(prompt=PROMPTS[0], max_new_tokens=4, temperature=0.7, seed=1),
]


def completions_of(config, placement, engine, batch):
    """Tokens of one process and of all ranks, and how far logits of the first prompt are apart."""
    whole, parts = make_models(config, placement)
    engines = open_engine("eager", whole, None), open_engine(engine, parts, None)
    groups = {}, {"ranks": ranks_of_group()}
    found = [
        [each.tokens for each in Generator(one, max_batch=batch, **group).complete(ASKED)]
        for one, group in zip(engines, groups, strict=True)
    ]
    prompt = torch.tensor([PROMPTS[0]])
    expected, ours = (one.prefill(prompt)[0][:, -1] for one in engines)
    torch._dynamo.reset()
    return *found, float((expected - ours).abs().max())


def check_completions(answers):
    for alone, together, difference in answers:
        assert together == alone
        assert difference < 1e-5
        assert alone[0] != alone[2]


@pytest.mark.parametrize(
    ("family", "placement"),
    [(family, PLACEMENTS[index % 2]) for index, family in enumerate(("ultramem", "pkm", "peer", "ultramem-v2"))],
)
def test_greedy_and_sampled_tokens_are_those_of_one_process(ranks, family, placement):
    check_completions(ranks(2).run(completions_of, FAMILIES[family], placement, "eager", 2))


def test_compiled_tokens_are_those_of_one_process(ranks):
    check_completions(ranks(2).run(completions_of, FAMILIES["ultramem"], "rows", "compile", 1))


def compiled_difference(config, placement):
    whole, parts = (model.memories[0].table for model in make_models(config, placement, torch.float64))
    generator = torch.Generator().manual_seed(1)
    memory = config.memory
    indices = torch.randint(0, memory.expansion * memory.table_rows, (5, 8), generator=generator)
    scores = torch.randn(5, 8, memory.num_cores, generator=generator, dtype=torch.float64)
    found = torch.compile(parts, fullgraph=True)(indices, scores, memory.expansion)
    torch._dynamo.reset()
    return float((found - whole(indices, scores, memory.expansion)).abs().max())


def test_columns_are_joined_in_one_compiled_graph(ranks):
    assert max(ranks(2).run(compiled_difference, FAMILIES["ultramem"], "columns")) < 1e-12


class Leaning:
    """Logits on one rank that another machine would have rounded otherwise: its favourite token is always 9."""

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def prefill(self, *args):
        return self._lean(*self.engine.prefill(*args))

    def decode(self, *args):
        return self._lean(*self.engine.decode(*args))

    def _lean(self, logits, cache):
        logits[..., 9] += 1e6
        return logits, cache


def tokens_where_ranks_differ(config):
    whole, parts = make_models(config, "rows")
    engine = open_engine("eager", parts, None)
    if dist.get_rank() == 1:
        engine = Leaning(engine)
    expected = Generator(open_engine("eager", whole, None)).complete(ASKED)
    found = Generator(engine, ranks=ranks_of_group()).complete(ASKED)
    return [each.tokens for each in expected] == [each.tokens for each in found]


def test_ranks_that_round_otherwise_go_the_way_of_the_main_one(ranks):
    assert ranks(2).run(tokens_where_ranks_differ, FAMILIES["ultramem"]) == [True, True]


def reasons_where_one_rank_cancels(config):
    _, parts = make_models(config, "rows")
    generator = Generator(open_engine("eager", parts, None), max_batch=1, ranks=ranks_of_group())
    ids = [generator.submit(request) for request in ASKED]
    reasons = {}
    for event in generator.run():
        if dist.get_rank() == 1 and event.request_id == ids[0]:
            generator.cancel(ids[0])
            generator.cancel(ids[2])
        if event.finish_reason is not None:
            reasons[event.request_id] = event.finish_reason
    return reasons


def test_what_one_rank_cancels_ends_on_all(ranks):
    reasons = {0: "cancelled", 1: "length", 2: "cancelled"}
    assert ranks(2).run(reasons_where_one_rank_cancels, FAMILIES["ultramem"]) == [reasons, reasons]


def error_with_gradients(config):
    model = build_model(config, shard=make_shard("rows")).eval()
    try:
        model(torch.tensor([[1, 2]]))
    except ValueError as error:
        return str(error)
    return None


def test_gradients_are_refused(ranks):
    wanted = "tokens must be own for a sharded table that takes gradients, got same: call it under torch.no_grad()"
    assert ranks(2).run(error_with_gradients, FAMILIES["ultramem"]) == [wanted, wanted]


def loaded(folder, placement, dtype):
    model = ultramem.load(folder, shard=make_shard(placement), dtype=dtype)
    whole = ultramem.load(folder, dtype=dtype)
    tables = [module for module in model.modules() if isinstance(module, ValueTable)]
    for (name, part), expected in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        full = part.full_tensor() if "table" in name else part
        torch.testing.assert_close(full, expected, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    return [tuple(table.values_NV.shape) for table in tables]


@pytest.mark.parametrize(("placement", "dtype"), [("rows", None), ("columns", torch.bfloat16)])
def test_a_rank_loads_its_part(ranks, tmp_path, placement, dtype):
    config = FAMILIES["ultramem-v2"]
    save_weights(build_model(config), tmp_path)
    write_config(tmp_path, config)
    rows, columns = config.memory.table_rows, config.memory.value_dim
    half = (-(-rows // 2), columns) if placement == "rows" else (rows, columns // 2)
    for shapes in ranks(2).run(loaded, tmp_path, placement, dtype):
        assert shapes == [half]


def error_of_loading(folder, **options):
    try:
        ultramem.load(folder, shard=make_shard("rows"), **options)
    except ValueError as error:
        return str(error)
    return None


def error_of_mapping(folder):
    return error_of_loading(folder, mmap=True)


def test_a_run_that_does_not_fit_or_is_mapped_is_refused(ranks, tmp_path):
    config = FAMILIES["ultramem"]
    save_weights(build_model(replace(config, hidden_size=64, memory=replace(config.memory, hidden_size=64))), tmp_path)
    write_config(tmp_path, config)
    for error in ranks(2).run(error_of_loading, tmp_path):
        assert "does not fit" in error
    for error in ranks(2).run(error_of_mapping, tmp_path):
        assert error.startswith("mmap must be False")


def logits_within(folder, placement, allowed_bytes):
    """Of a run that is loaded with so much memory more; and what a load of the whole of it says."""
    tokens = torch.tensor([[1, 2, 3, 4]])
    expected = ultramem.load(folder, mmap=True)(tokens).logits
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + allowed_bytes, hard))
    try:
        with torch.no_grad():
            found = ultramem.load(folder, shard=make_shard(placement))(tokens).logits
        ultramem.load(folder)
    except RuntimeError as error:
        refused = str(error)
    else:
        refused = ""
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    return float((found - expected).abs().max()), refused


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux")
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_rank_loads_more_than_its_part(ranks, tmp_path, placement):
    config = FAMILIES["ultramem"]
    config = replace(config, memory=replace(config.memory, knum=256, value_dim=256))
    table_bytes = 256**3 * 4
    save_weights(build_model(config), tmp_path)
    write_config(tmp_path, config)
    for difference, refused in ranks(2).run(logits_within, tmp_path, placement, table_bytes * 7 // 8):
        assert difference < 1e-5
        assert "Cannot allocate memory" in refused


def test_one_process_has_no_placement():
    with inference_ranks(FAMILIES["ultramem"], None) as (alone, shard, reason):
        assert (alone.size, shard, reason) == (1, None, "")
    with (
        pytest.raises(ValueError, match=r"table_placement needs several ranks .*got 'rows' in one process"),
        inference_ranks(FAMILIES["ultramem"], "rows"),
    ):
        pass


def test_exports_of_a_whole_model_are_no_engines_of_ranks():
    with pytest.raises(ValueError, match="engine must be one of eager, compile, aoti where 2 ranks share, got 'onnx'"):
        require_model_engine(Ranks(size=2), "onnx")


def start_ranks(*args):
    """Two ranks of the command line, and a pipe for what they print."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ultramem")
    return subprocess.Popen(
        [*command, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def workers_of(parent):
    found = {}
    for pid in subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split():
        with open(f"/proc/{pid}/environ", "rb") as file:
            names = dict(entry.split(b"=", 1) for entry in file.read().split(b"\0") if b"=" in entry)
        if b"RANK" in names:
            found[int(names[b"RANK"])] = int(pid)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_one_prints_and_a_signal_to_another_ends_all(tmp_path):
    config = replace(FAMILIES["ultramem"], vocab_size=257)
    torch.manual_seed(0)
    model = build_model(config)
    save_weights(model, tmp_path)
    write_config(tmp_path, config)
    tokenizer = load_tokenizer(tmp_path)
    prompt = "Once"
    request = Request(prompt=(tokenizer.end_of_text, *tokenizer.encode(prompt)), max_new_tokens=40)
    engine = open_engine("eager", model.eval(), None)
    expected = Generator(engine, tokenizer=tokenizer, end_of_text=-1).complete([request])[0].text
    ranks = start_ranks("generate", str(tmp_path), "--prompt", prompt, "--max-new-tokens", "4000")
    printed = ""
    try:
        while len(printed.partition(prompt)[2]) < 20:
            piece = ranks.stdout.read(1)
            assert piece, printed
            printed += piece
        os.kill(workers_of(ranks.pid)[1], signal.SIGINT)
        printed += ranks.communicate(timeout=60)[0]
    finally:
        ranks.kill()
    assert printed.count(prompt) == 1
    assert expected[:10] in printed
    assert printed.count("ultramem generate: stopped") == 2
    assert "lost another rank" not in printed
