"""The experiment's runs, and its page: the numbers are the raw files', and the words follow the numbers."""

import json
import math
import re
import runpy
import shutil
from pathlib import Path

import pytest
from experiment_page.markdown import make_page
from experiment_page.raw import read_experiment, settings
from experiment_page.results import as_text, make_results
from experiment_page.spread import chance_beyond, difference
from experiment_page.words import agreement

from ultramem import count, preset
from ultramem.cli import _build_parser
from ultramem.config import to_dict
from ultramem.runtime.recipe import make_recipe

ROOT = Path(__file__).parent.parent
HERE = ROOT / "docs/experiment"
EXPERIMENT = runpy.run_path(str(ROOT / "examples/experiment.py"), run_name="experiment")
BASELINE = "ultramem-tiny"
STEPS = 40
# Bits per byte of three seeds, held out; out of domain is 0.5 more. By hand: no-ive is worse by 0.10, 0.11, 0.12, so
# 0.11 on average, std 0.01, beyond the noise; two-tailed by -0.02, 0.01, 0.01, so 0, std 0.0173.
BITS = {
    "dense-tiny": (3.10, 3.00, 3.05),
    "moe-tiny": (3.00, 2.91, 2.95),
    "pkm-tiny": (3.20, 3.11, 3.15),
    "ultramem-tiny": (2.90, 2.80, 2.85),
    "two-tailed": (2.88, 2.81, 2.86),
    "no-ive": (3.00, 2.91, 2.97),
}
ABLATIONS = {"two-tailed": EXPERIMENT["ABLATIONS"]["two-tailed"], "no-ive": EXPERIMENT["ABLATIONS"]["no-ive"]}


def _options(name):
    return EXPERIMENT["ABLATIONS"].get(name, ())


def _recipe(name, seed=0):
    changes = [*settings(EXPERIMENT["TRAINING"]), f"train.steps={STEPS}", *settings(_options(name))]
    family = name if name in EXPERIMENT["FAMILIES"] else BASELINE
    return make_recipe(preset=family, data="gutenberg", settings=[*changes, f"train.seed={seed}"])


def _evaluation(step, split, bits):
    loss = bits * math.log(2)
    return {
        "step": step, "split": split, "eval_loss": loss, "bits_per_byte": bits, "perplexity": math.exp(loss),
        "tokens": 1000, "text_bytes": 1000, "seconds": step + 0.5,
    }  # fmt: skip


def _metrics(name, bits):
    rates = {"grad_norm": 1.0, "lr": 1e-3, "value_lr": 1e-2, "tokens_per_second": 100.0, "mfu": 0.1}
    rows = [{"step": step, "loss": 5 - step / STEPS, **rates, "seconds": float(step)} for step in range(1, STEPS + 1)]
    for step in (STEPS // 2, STEPS):
        rows.append(_evaluation(step, "held_out_sample", bits + 1 - step / STEPS))
        if name == BASELINE:
            used = {"rows": 4, "reads": 9, "used_lately": 0.25, "used_ever": 0.5, "dead_rows": 2}
            used["kl_from_uniform_nats"] = 2.0
            layer = {"score_mean": 1.5, "score_variance": 0.1, "output_rms": 0.75, "singular_values": [[1.0, 0.5]]}
            rows.append({"step": step, "kind": "value_table", "name": "memories.0.table", **used, "seconds": 1.0})
            rows.append({"step": step, "kind": "memory_layer", "name": "memories.0", **layer, "seconds": 1.0})
    return [*rows, _evaluation(STEPS, "held_out", bits), _evaluation(STEPS, "out_of_domain", bits + 0.5)]


def _write_run(folder, name, seed, bits):
    recipe = _recipe(name, seed)
    folder.mkdir()
    document = {
        "format_version": 1,
        "model": to_dict(recipe.model),
        "train": to_dict(recipe.train),
        "data": {"name": "gutenberg", "sha256": "ab" * 32},
        "environment": {"ultramem": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "device": "cpu", "threads": 1},
    }
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _metrics(name, bits)))


@pytest.fixture
def raw(tmp_path):
    """A whole small experiment: four families and two ablations, three seeds."""
    folder = tmp_path / "raw"
    folder.mkdir()
    training = [*EXPERIMENT["TRAINING"], "--steps", str(STEPS)]
    record = {"commits": ["c0ffee"], "seeds": 3, "families": EXPERIMENT["FAMILIES"], "training": training}
    (folder / "experiment.json").write_text(json.dumps({**record, "ablations": ABLATIONS}))
    for name, by_seed in BITS.items():
        for seed, bits in enumerate(by_seed):
            _write_run(folder / f"{name}-seed{seed}", name, seed, bits)
    return folder


@pytest.fixture(scope="module")
def write_page():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        return runpy.run_path(str(HERE / "make_page.py"), run_name="make_page")["write_page"]


def _results(raw):
    return make_results(read_experiment(raw))


def _change_json(path, *keys, to):
    document = json.loads(path.read_text())
    *parents, last = keys
    inner = document
    for key in parents:
        inner = inner[key]
    inner[last] = to
    path.write_text(json.dumps(document))


def test_families_come_first_seed_by_seed():
    runs = EXPERIMENT["runs"](2)
    assert [run.folder for run in runs[:5]] == [
        "dense-tiny-seed0", "moe-tiny-seed0", "pkm-tiny-seed0", "ultramem-tiny-seed0", "dense-tiny-seed1",
    ]  # fmt: skip
    assert len({run.folder for run in runs}) == len(runs) == 2 * (4 + 7)
    assert all(run.preset == BASELINE for run in runs if run.name in EXPERIMENT["ABLATIONS"])


def test_options_of_every_run_are_options_of_ultramem_train():
    for run in EXPERIMENT["runs"](1):
        words = ["train", "--preset", run.preset, "--out", "x", *EXPERIMENT["TRAINING"], *run.options]
        args = _build_parser().parse_args(words)
        assert args.steps == 300
        # The page reads options as settings; they must mean the same there.
        recipe = make_recipe(preset=run.preset, data="x", settings=settings([*EXPERIMENT["TRAINING"], *run.options]))
        fields = to_dict(recipe.train)
        fields |= fields.pop("parallel")  # its fields are flags as well
        for name, value in fields.items():
            assert getattr(args, name) in (None, value), name


@pytest.mark.parametrize(
    ("name", "fields"),
    {
        "two-tailed": {"memory.candidates"},
        "no-half-vdim": {"memory.value_dim", "memory.knum", "memory.top_m"},
        "no-split": {"insertions", "memory.knum", "memory.top_m"},
        "no-ive": {"memory.expansion"},
        "no-tdqkr-mcs": {"memory.rank", "memory.num_cores"},
        "no-mcs": {"memory.num_cores"},
        "no-value-lr": {"train.value_lr_ratio"},
    }.items(),
)
def test_an_ablation_changes_its_switch_and_the_sizes_that_go_with_it(name, fields):
    def flat(recipe):
        model = to_dict(recipe.model)
        memory = {f"memory.{key}": value for key, value in model.pop("memory").items()}
        return model | memory | {f"train.{key}": value for key, value in to_dict(recipe.train).items()}

    before, after = flat(_recipe(BASELINE)), flat(_recipe(name))
    assert {key for key in before if before[key] != after[key]} == fields
    ours, theirs = count(_recipe(BASELINE).model), count(_recipe(name).model)
    assert theirs.sparse == pytest.approx(ours.sparse, rel=0.01)
    assert theirs.total == pytest.approx(ours.total, rel=0.04)
    assert theirs.flops_per_token == pytest.approx(ours.flops_per_token, rel=0.11)


def test_every_ablation_is_tested_and_explained():
    from experiment_page.paper import SWITCHES
    from experiment_page.tables import WITHOUT

    assert set(WITHOUT) == set(EXPERIMENT["ABLATIONS"])
    assert set(SWITCHES) == set(EXPERIMENT["ABLATIONS"]) - {"two-tailed"}


def test_publish_takes_finished_runs_alone(tmp_path):
    out = tmp_path / "out"
    for folder in ("dense-tiny-seed0", "moe-tiny-seed0", "dense-tiny-seed3"):
        (out / folder).mkdir(parents=True)
        (out / folder / "config.json").write_text("{}")
        (out / folder / "metrics.jsonl").write_text("")
    for finished in ("dense-tiny-seed0", "dense-tiny-seed3"):
        (out / finished / "model.safetensors").write_bytes(b"")
    (out / "experiment.json").write_text("{}")
    EXPERIMENT["publish"](out, tmp_path / "raw", 4)
    names = sorted(str(path.relative_to(tmp_path / "raw")) for path in (tmp_path / "raw").rglob("*.*"))
    assert names == [
        "dense-tiny-seed0/config.json", "dense-tiny-seed0/metrics.jsonl",
        "dense-tiny-seed3/config.json", "dense-tiny-seed3/metrics.jsonl", "experiment.json",
    ]  # fmt: skip


def test_results_are_what_a_calculator_says(raw):
    results = _results(raw)
    dense = results["families"]["dense-tiny"]
    assert dense["held_out_bits_per_byte"]["mean"] == pytest.approx(3.05)
    assert dense["held_out_bits_per_byte"]["std"] == pytest.approx(0.05)  # of the sample: sqrt(0.005 / 2)
    assert dense["out_of_domain_bits_per_byte"]["by_seed"] == pytest.approx({"0": 3.6, "1": 3.5, "2": 3.55})
    assert dense["train_loss_at_end"]["mean"] == pytest.approx(5 - 25.5 / STEPS)  # steps 11 to 40
    assert dense["tokens_seen"] == STEPS * 4 * 256
    assert dense["seconds_with_compilation"]["mean"] == STEPS + 0.5
    counts = count(preset("dense-tiny"))
    assert dense["flops_per_token"] == counts.flops_per_token
    assert dense["parameters"] == {
        "total": counts.total, "sparse": 0, "with_embeddings": counts.total_with_embeddings,
    }  # fmt: skip

    no_ive = results["ablations"]["no-ive"]["difference_to_baseline"]["held_out"]
    assert no_ive["by_seed"] == pytest.approx({"0": 0.10, "1": 0.11, "2": 0.12})
    assert (no_ive["mean"], no_ive["std"]) == (pytest.approx(0.11), pytest.approx(0.01))
    assert no_ive["standard_error"] == pytest.approx(0.01 / math.sqrt(3))
    t = 0.11 / (0.01 / math.sqrt(3))
    assert no_ive["p"] == pytest.approx(
        1 - t / math.sqrt(2 + t * t), abs=1e-6
    )  # Student's t in closed form for 3 seeds
    assert no_ive["verdict"] == "a difference"
    assert results["ablations"]["no-ive"]["baseline_std"]["held_out"] == pytest.approx(0.05)
    two_tailed = results["ablations"]["two-tailed"]["difference_to_baseline"]["held_out"]
    assert two_tailed["mean"] == pytest.approx(0, abs=1e-12)
    assert two_tailed["std"] == pytest.approx(math.sqrt(0.0006 / 2))
    assert two_tailed["verdict"] == "within the noise"
    assert (results["runs_finished"], results["runs_planned"], results["runs_missing"]) == (18, 18, [])
    assert results["commits"] == ["c0ffee"]
    assert results["memory_health"]["memories.0.table"]["used_ever"] == 0.5


def test_the_chance_of_a_difference_is_students():
    assert chance_beyond(2.0, 2) == pytest.approx(1 - 2 / math.sqrt(6), abs=1e-9)
    assert chance_beyond(12.706, 1) == pytest.approx(0.05, abs=1e-4)
    assert chance_beyond(4.303, 2) == pytest.approx(0.05, abs=1e-4)
    assert chance_beyond(2.776, 4) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize(
    ("ours", "verdict", "word"),
    [
        ((1.02, 1.005, 1.02), "a hint", "agrees (a hint)"),  # 0.015 ± 0.005: t = 3, p = 0.095
        ((1.10, 1.11, 1.12), "a difference", "agrees"),
        ((0.90, 0.89, 0.88), "a difference", "disagrees"),
        ((1.01, 0.99, 1.00), "within the noise", "cannot tell"),
        ((1.01,), "one seed", "cannot tell"),
    ],
)
def test_a_difference_is_called_what_it_is(ours, verdict, word):
    by_seed = {str(seed): value for seed, value in enumerate(ours)}
    figure = difference(by_seed, {"0": 1.0, "1": 1.0, "2": 1.0})
    assert figure.verdict == verdict
    assert agreement(figure._asdict(), 0.02) == word


def test_words_follow_the_numbers(raw):
    page = make_page(_results(raw))
    assert "partial" not in page
    assert "Held-out bits per byte, by mean, lowest first: `ultramem-tiny` 2.850 ± 0.050, `moe-tiny` 2.953" in page
    assert "`ultramem-tiny` is better than `dense-tiny` by 0.2000 ± 0.0000 bits per byte on held-out text" in page
    assert "beyond the noise: `no-ive` (+0.1100 ± 0.0058); hints: none; nothing can be said of: `two-tailed`" in page
    # PKM loses to dense here and nowhere in the paper; UltraMem against MoE is as at the paper's larger sizes only.
    assert (
        "Against the paper: `dense-tiny` is ahead of `pkm-tiny` here; in the paper it is behind at 151M, 680M" in page
    )
    assert "Against the paper: `ultramem-tiny` is ahead of `moe-tiny` here; in the paper it is behind at 151M." in page
    assert "disagrees with 151M; agrees with 680M and 1.6B" in page
    assert not re.search(r"Against the paper: `(no-ive|two-tailed)`", page)

    # The same switch with the opposite effect, and a family's lead that is noise.
    for seed, bits in enumerate((2.80, 2.69, 2.73)):
        shutil.rmtree(raw / f"no-ive-seed{seed}")
        _write_run(raw / f"no-ive-seed{seed}", "no-ive", seed, bits)
    for seed, bits in enumerate((2.95, 2.79, 2.84)):
        shutil.rmtree(raw / f"moe-tiny-seed{seed}")
        _write_run(raw / f"moe-tiny-seed{seed}", "moe-tiny", seed, bits)
    page = make_page(_results(raw))
    assert (
        "Against the paper: `no-ive`: -0.1100 ± 0.0058 bits per byte, so the switch made the model worse here" in page
    )
    assert "`ultramem-tiny` and `moe-tiny` are within the noise of each other on held-out text" in page
    assert not re.search(r"ultramem-tiny` is (ahead of|better than) `moe-tiny", page)


def test_without_disagreement_the_page_says_so(raw):
    for seed, bits in enumerate((3.0, 2.90, 2.95)):
        shutil.rmtree(raw / f"pkm-tiny-seed{seed}")
        _write_run(raw / f"pkm-tiny-seed{seed}", "pkm-tiny", seed, bits)
        shutil.rmtree(raw / f"moe-tiny-seed{seed}")
        _write_run(raw / f"moe-tiny-seed{seed}", "moe-tiny", seed, (2.85, 2.85, 2.85)[seed])
    assert "Against the paper: no sign that can be told from the noise is against it." in make_page(_results(raw))


def test_a_partial_experiment_says_so(raw):
    for folder in ("no-ive-seed1", "no-ive-seed2", "two-tailed-seed0", "two-tailed-seed1", "two-tailed-seed2"):
        shutil.rmtree(raw / folder)
    shutil.rmtree(raw / "ultramem-tiny-seed2")
    results = _results(raw)
    assert results["ablations"].keys() == {"no-ive"}
    assert results["ablations"]["no-ive"]["seeds_finished"] == 1
    figure = results["ablations"]["no-ive"]["difference_to_baseline"]["held_out"]
    assert (figure["mean"], figure["std"], figure["verdict"]) == (pytest.approx(0.1), None, "one seed")
    pair = next(pair for pair in results["family_differences"] if pair["minus"] == BASELINE)
    assert pair["held_out"]["by_seed"].keys() == {"0", "1"}  # the seeds that both have
    page = make_page(results)
    assert "**This experiment is partial: 12 of 18 runs are finished.** Missing: `ultramem-tiny-seed2`" in page
    assert "cannot tell (too few seeds)" in page


def test_families_alone_make_a_page(raw, tmp_path, write_page):
    for name in ABLATIONS:
        for seed in range(3):
            shutil.rmtree(raw / f"{name}-seed{seed}")
    write_page(raw, tmp_path / "page")
    assert "No ablation is finished." in (tmp_path / "page/README.md").read_text()
    assert not (tmp_path / "page/ablations.svg").exists()


def test_the_same_files_give_the_same_bytes(raw, tmp_path, write_page):
    for name in ("one", "two"):
        write_page(raw, tmp_path / name)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    plots = {"curves.svg", "families.svg", "ablations.svg", "memory.svg"}
    assert names == {"README.md", "results.json", "report.html", *plots}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    page = (tmp_path / "one/README.md").read_text()
    assert set(re.findall(r"\]\((\w+\.svg)\)", page)) == plots


@pytest.mark.parametrize(
    ("run", "keys", "value", "message"),
    [
        ("moe-tiny-seed1", ("train", "lr"), 1e-3, r"moe-tiny-seed1: train\.lr must be 0\.002.*got 0\.001"),
        ("no-ive-seed0", ("train", "value_lr_ratio"), 1.0, r"train\.value_lr_ratio must be 10\.0"),
        ("no-ive-seed0", ("model", "memory", "expansion"), 4, r"model\.memory\.expansion must be 1"),
        ("no-ive-seed0", ("model", "memory", "top_m"), 8, r"model\.memory\.top_m must be 16"),
        ("dense-tiny-seed2", ("model", "inner_size"), 1000, r"model\.inner_size must be 1048"),
        ("pkm-tiny-seed0", ("train", "seed"), 1, r"train\.seed must be 0"),
        ("pkm-tiny-seed0", ("data", "sha256"), "cd" * 32, r"data\.sha256 must be 'abab"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(raw, run, keys, value, message):
    _change_json(raw / run / "config.json", *keys, to=value)
    with pytest.raises(ValueError, match=message):
        read_experiment(raw)


def test_step_counts_must_be_equal(raw):
    _change_json(raw / "two-tailed-seed1/config.json", "train", "steps", to=STEPS - 1)
    with pytest.raises(ValueError, match=r"two-tailed-seed1.* must hold the steps 1 to 39, each once, got 40 steps"):
        read_experiment(raw)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-1], "ends within a line"),
        (lambda text: text.replace('{"step": 7,', '{"step": 7'), r"metrics\.jsonl:7 is not JSON"),
        (lambda text: text.replace('"loss": 4.5', '"loss": NaN'), "holds NaN"),
        (lambda text: "".join(text.splitlines(keepends=True)[1:]), "must hold the steps 1 to 40"),
        (lambda text: "".join(text.splitlines(keepends=True)[:-1]), "one final evaluation of out_of_domain, got 0"),
        (lambda text: text.replace('"bits_per_byte": 2.9,', '"bits_per_byte": 2.8,'), r"bits_per_byte must be 2\.9"),
        (lambda text: text.replace('"tokens": 1000', '"tokens": 999').replace("1000", "999"), "tokens must be 1000"),
        (lambda text: text.replace('"seconds": 7.0', '"second": 7.0'), r"jsonl:7 must be a row with step and seconds"),
    ],
)
def test_damaged_metrics_are_refused(raw, damage, message):
    path = raw / "ultramem-tiny-seed0/metrics.jsonl"
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(ValueError, match=message):
        read_experiment(raw)


def test_what_is_missing_or_not_planned_is_named(raw):
    (raw / "dense-tiny-seed3").mkdir()
    with pytest.raises(ValueError, match="dense-tiny-seed3 is not a run of"):
        read_experiment(raw)
    (raw / "dense-tiny-seed3").rmdir()
    (raw / "dense-tiny-seed1/metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"dense-tiny-seed1/metrics\.jsonl is missing"):
        read_experiment(raw)
    (raw / "experiment.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"experiment\.py --publish"):
        read_experiment(raw)


def test_ablations_without_their_baseline_are_refused(raw):
    for seed in range(3):
        shutil.rmtree(raw / f"{BASELINE}-seed{seed}")
    with pytest.raises(ValueError, match="no run of ultramem-tiny to compare them with"):
        read_experiment(raw)


@pytest.mark.skipif(not (HERE / "raw").exists(), reason="the experiment has not been published yet")
def test_the_committed_page_is_what_the_committed_raw_files_give():
    results = _results(HERE / "raw")
    assert (HERE / "results.json").read_text() == as_text(results)
    assert (HERE / "README.md").read_text() == make_page(results)
    for target in re.findall(r"\]\(([^)#]+)\)", make_page(results)):
        assert (HERE / target).exists(), target
