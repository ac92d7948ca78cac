"""The benchmark runner: it times what is right, loses a row at a time, and goes on where it was."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import made_up_subjects
import pytest
import torch

from benchmarks import export_parity, gpu, report, run
from benchmarks.harness import clock, launches, scheduler, worker
from benchmarks.harness.contender import Contender
from benchmarks.harness.goals import evaluate
from benchmarks.harness.measure import QUICK, Budget, measure, summary
from benchmarks.harness.results import Results
from benchmarks.harness.row import Goal, selected
from benchmarks.harness.scheduler import Plan, run_rows
from benchmarks.harness.source import ROOT, Source, source
from benchmarks.harness.table import goals_table
from benchmarks.harness.turns import Turns

PROBE = {
    "device": "a device",
    "threads": 1,
    "python": "3.11",
    "versions": {"torch": "2"},
    "bytes_per_second": 1e10,
    "flops_per_second": {"float32": 1e11},
}
CLEAN = Source("c0ffee", False)
SUBJECTS = "tests.made_up_subjects"
ROWS = {row.subject: row for row in made_up_subjects.rows("cpu")}


def run_made_up(path: Path, *subjects: str, at: Source = CLEAN, **plan) -> Results:
    results = Results(path, "cpu", [row.name for row in ROWS.values()])
    rows = [ROWS[subject] for subject in subjects]
    plan = Plan(suite="cpu", subjects=SUBJECTS, quick=True, **plan)
    run_rows(rows, results, plan, probed=PROBE, find_source=lambda: at)
    return results


def record_of(subject: str) -> dict:
    """What a worker writes about a row, measured in this process."""
    row = ROWS[subject]
    return worker.measure_row(row, made_up_subjects.build, torch.device("cpu"), PROBE, QUICK, Turns())


def test_a_row_has_medians_and_quartiles_a_floor_and_its_goals():
    record = record_of("right")
    ours, peer, absent, _ = record["contenders"]
    assert [c["status"] for c in (ours, peer, absent)] == ["measured", "measured", "unavailable"]
    low, high = ours["quartiles_us"]
    assert 0 < low <= ours["median_us"] <= high
    assert record["floor"] == {"bytes": 800, "request_bytes": 800, "flops": 0, "us": 0.08, "bound": "bandwidth"}
    (goal,) = record["goals"]
    assert goal["value"] == pytest.approx(peer["median_us"] / ours["median_us"], abs=1e-3)
    assert goal["reached"] is (goal["value"] >= 2)


def test_a_wrong_result_is_not_timed_and_costs_its_contender_alone():
    ours, wrong, _, broken = record_of("wrong")["contenders"]
    assert ours["status"] == "measured"
    assert wrong["status"] == "wrong"
    assert "differs from float64 by 1" in wrong["reason"]
    assert "median_us" not in wrong
    assert broken["reason"] == "MemoryError: the table does not fit"
    (goal,) = record_of("wrong")["goals"]
    assert (goal["value"], goal["reached"]) == (None, None)  # a refused rival is not beaten


def test_contenders_take_turns():
    order = []

    class Clock:
        def how(self, contender):
            return ""

        def burst(self, contender, calls):
            order.append(contender.settings)
            return [2e5 if contender.settings == "slow" else 10.0] * calls

    def contender(name):
        return Contender(role="peer", settings=name, draw=dict, run=len, check=dict)

    contenders = {name: contender(name) for name in ("slow", "quick")}
    samples = measure(contenders, Clock(), Budget(seconds=1.0, min_rounds=4, max_samples=30, warm_up=1))
    assert order[:10] == ["slow", "quick"] * 5
    assert len(samples["slow"]) == 5  # a second's worth
    assert 30 <= len(samples["quick"]) < 40  # bursts of 8 until there are enough


class FakeCuda:
    """Just enough of torch.cuda for a clock: a stream on which everything takes 2 ms."""

    now_ms = 0.0
    replays = 0

    class _Event:
        def __init__(self, enable_timing):
            self.at_ms = None

        def record(self):
            FakeCuda.now_ms += 2.0
            self.at_ms = FakeCuda.now_ms

        def elapsed_time(self, end):
            return end.at_ms - self.at_ms

    class _CUDAGraph:
        def replay(self):
            FakeCuda.replays += 1

    class _Stream:
        def wait_stream(self, other):
            pass

    @classmethod
    def install(cls, monkeypatch):
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        cls.waits = 0
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: setattr(cls, "waits", cls.waits + (cycles > 0)))
        monkeypatch.setattr(torch.cuda, "current_stream", cls._Stream)
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
        for name in ("Event", "CUDAGraph", "Stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(cls, f"_{name}"))


def test_on_a_gpu_decode_shapes_are_timed_in_a_graph_on_fresh_inputs(monkeypatch):
    FakeCuda.install(monkeypatch)
    monkeypatch.setattr(clock, "FLUSH_BYTES", 8)
    drawn, seen = iter(range(1000)), []
    contender = Contender(
        role="ours",
        settings="",
        draw=lambda: (torch.tensor([next(drawn)]), "what is no tensor"),
        run=lambda x: seen.append(x[0]),
        check=dict,
    )
    on_gpu = clock.GpuClock(torch.device("cpu"), graph=True)
    assert on_gpu.burst(contender, 2) == [2000 / clock.GRAPH_CALLS] * 2
    assert on_gpu.how(contender) == "events, in a CUDA graph"
    assert FakeCuda.replays == 2
    assert FakeCuda.waits == 2  # so that what the host does before is not in the time
    captured = seen[2:]  # after the warm-up
    assert [int(x) for x in captured] == list(
        range(32, 48)
    )  # the third set of 16: replaced in place before each replay
    assert clock.GpuClock(torch.device("cpu"), graph=False).burst(contender, 1) == [2000]

    def refuses(_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    stubborn = replace(contender, run=refuses)
    with pytest.raises(RuntimeError):
        on_gpu.burst(stubborn, 1)
    assert on_gpu.how(stubborn) == "events, launched from Python (operation not permitted when stream is capturing)"


def test_summary_of_one_sample_and_of_many():
    assert summary([5.0]) == {"median_us": 5.0, "quartiles_us": [5.0, 5.0], "samples": 1}
    assert summary([1.0, 2.0, 3.0, 4.0, 100.0])["quartiles_us"] == [2.0, 4.0]


@pytest.mark.parametrize(
    ("goal", "value", "reached"),
    [
        (Goal(text="", quantity="speedup", bound=4.0), 4.0, True),  # over the best peer, 40 us
        (Goal(text="", quantity="speedup", bound=9.0, against="slow"), 8.0, False),
        (Goal(text="", quantity="slowdown", bound=0.5, against="yard"), 2.0, False),
        (Goal(text="", quantity="floor_ratio", bound=1.35), 1.25, True),
        (Goal(text="", quantity="over_floor_us", bound=3.0, factor=1.25), 0.0, True),
        (Goal(text="", quantity="bandwidth_share", bound=0.92), 0.9, False),
        (Goal(text="", quantity="launches", bound=4), 3, True),
        (Goal(text="", quantity="speedup", bound=1.0, of="second"), 2.0, True),
        (Goal(text="", quantity="speedup", bound=1.0, against="lost"), None, None),
    ],
    ids=lambda x: f"{x.quantity} {x.against}{x.of}" if isinstance(x, Goal) else None,
)
def test_goals(goal, value, reached):
    def contender(name, role, median_us, **more):
        return {"name": name, "role": role, "status": "measured", "median_us": median_us, **more}

    contenders = [
        contender("ours", "ours", 10.0, launches=3),
        contender("second", "ours", 20.0),
        contender("quick", "peer", 40.0),
        contender("slow", "peer", 80.0),
        contender("yard", "yardstick", 5.0),
        {"name": "lost", "role": "peer", "status": "failed", "reason": ""},
    ]
    floor = {"us": 8.0, "request_bytes": 90_000}
    result = evaluate(goal, contenders, floor, PROBE)
    assert (result["value"], result["reached"]) == (value, reached)


def test_a_crash_and_a_hang_lose_their_rows_alone(tmp_path):
    results = run_made_up(tmp_path / "out.json", "crash", "hang", "last")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    status = {row["subject"]: (row["status"], row.get("reason", "")) for row in rows}
    assert status["crash"] == ("lost", "killed by SIGSEGV")
    assert status["hang"][0] == "lost"
    assert status["hang"][1].endswith("stopped after 0 s")
    assert status["last"][0] == "measured"
    assert {row["commit"] for row in rows} == {"c0ffee"}
    table = goals_table(results.document())
    assert "killed by SIGSEGV" in table
    assert "2 lost, 1 measured" in table


def test_rows_of_the_same_commit_are_not_measured_again(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    measured = []

    class Worker:
        def __init__(self, arguments, plan, limit_s):
            measured.append(arguments[1].partition("/")[0])

        def own_seconds(self):
            return 0.0

        def poll(self):
            return {"status": "measured", "shape": {}, "contenders": [], "floor": None, "goals": []}

        def stop(self):
            pass

    monkeypatch.setattr(scheduler, "Worker", Worker)
    run_made_up(path, "right")
    run_made_up(path, "right", "last")
    assert measured == ["right", "last"]
    run_made_up(path, "right", at=Source("another", False))
    run_made_up(path, "right", at=Source("another", True))  # uncommitted changes: nobody knows what was measured
    run_made_up(path, "right", at=Source("another", True))
    run_made_up(path, "last", again=True)
    assert measured == ["right", "last", "right", "right", "right", "last"]
    assert [row["subject"] for row in json.loads(path.read_text())["rows"]] == ["right", "last"]


def test_what_the_deadline_leaves_is_recorded_as_not_run(tmp_path):
    results = run_made_up(tmp_path / "out.json", "right", "last", deadline=time.monotonic())
    assert [row["status"] for row in results.rows.values()] == ["not run", "not run"]


def test_the_deadline_stops_rows_under_way(tmp_path):
    began = time.monotonic()
    results = run_made_up(tmp_path / "out.json", "sleep", "hang", "last", deadline=began + 0.3, workers=2)
    assert time.monotonic() - began < 10
    rows = {row["subject"]: row for row in results.rows.values()}
    assert [row["status"] for row in rows.values()] == ["not run"] * 3
    assert rows["sleep"]["reason"] == "the time was up after 0 s of it"
    assert rows["last"]["reason"] == "the time was up"
    assert json.loads((tmp_path / "out.json").read_text()) == results.document()


def test_rows_prepared_beside_each_other_are_timed_one_at_a_time(tmp_path):
    path = tmp_path / "out.json"
    results = run_made_up(path, "slow", "killed", "right", "last", workers=4)
    assert results.document()["rows"] == json.loads(path.read_text())["rows"]
    rows = {row["subject"]: row for row in results.document()["rows"]}
    assert list(rows) == ["right", "last", "slow", "killed"]  # as in the suite, whichever ended first
    assert rows["killed"]["status"] == "lost"  # in its turn, which others get all the same
    assert rows["killed"]["reason"].endswith("killed by SIGKILL")
    timed = sorted(rows[subject]["timed_at_s"] for subject in ("slow", "right", "last"))
    assert all(begin < end for begin, end in timed)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(timed))
    assert rows["slow"]["spent_s"]["timed"] >= 0.5  # five calls of a tenth of a second
    for subject in ("slow", "right", "last"):
        spent, contenders = rows[subject]["spent_s"], rows[subject]["contenders"]
        assert set(spent) == {"start", "build", "prepare", "timed", "wait"}
        assert spent["prepare"] == pytest.approx(sum(each["prepare_s"] for each in contenders), abs=0.03)
        assert rows[subject]["seconds"] >= spent["start"]


def test_rows_share_the_memory_of_the_device():
    small, large = (replace(ROWS["right"], device_gb=gb) for gb in (20.0, 50.0))
    probed = PROBE | {"device_gb": 80.0}
    assert scheduler._has_room(small, [small, small], probed)
    assert not scheduler._has_room(large, [small, small], probed)
    assert scheduler._has_room(replace(large, device_gb=100.0), [], probed)  # it may try
    assert scheduler._has_room(large, [large, large], PROBE)  # no such device


def test_no_row_claims_more_than_an_h100_has():
    from benchmarks import subjects

    for row in subjects.rows("gpu"):
        assert 0 < row.device_gb < 80 * scheduler.DEVICE_SHARE, row.name


def test_launches_are_counted_on_inputs_that_are_used_once(monkeypatch):
    class Profile:
        def __init__(self, **options):
            pass

        def __enter__(self):
            counted.append(len(ran))
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            cuda = torch.autograd.DeviceType.CUDA
            return [SimpleNamespace(device_type=cuda)] * 3 + [SimpleNamespace(device_type=None)]

    ran, counted = [], []
    monkeypatch.setattr(torch.profiler, "profile", Profile)

    def draw():
        x = torch.ones(2, requires_grad=True)
        return x, x.square().sum()

    def run(inputs):
        ran.append(torch.autograd.grad(inputs[1], inputs[0]))  # a second time, it raises

    contender = Contender(role="ours", settings="", draw=draw, run=run, check=dict)
    assert launches.count_launches(contender, Turns()) == 3
    assert counted == [1]  # one call before, to warm up
    assert len(ran) == 2


def test_halves_of_the_papers_models_can_be_made():
    from benchmarks.subjects import model_step
    from ultramem import preset

    for name in model_step.PRESETS.values():
        half = model_step._half(preset(name))
        assert half.num_layers == model_step.LAYERS
        assert half.num_convs == (3 if half.memory else 0)


def test_an_interrupted_run_keeps_its_rows(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.run", "--suite", "cpu", "--quick", "--subjects", SUBJECTS]
    command += ["--rows", "right,sleep", "--out", str(path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    until = time.monotonic() + 400
    while not path.exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["subject"], row["status"]) == ("right", "measured")
    assert row["machine"]["bytes_per_second"] > 0


def test_rows_are_selected_by_name_beginning_and_glob():
    def names(*patterns):
        return [row.subject for row in selected(ROWS.values(), patterns)]

    assert names() == list(ROWS)
    assert names("right", "*/small/T=4/float32") == list(ROWS)
    assert names("last", "right/small") == ["right", "last"]
    with pytest.raises(ValueError, match="rows must select a row each, got 'rig'"):
        names("rig")


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_source_is_dirty_by_what_is_measured_alone(tmp_path):
    assert source(tmp_path) == Source("unknown", True)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "run.py").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    clean = source(tmp_path)
    assert len(clean.commit) == 40
    assert not clean.dirty
    (tmp_path / "benchmarks" / "results" / "cpu.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    assert source(tmp_path) == clean
    (tmp_path / "benchmarks" / "run.py").write_text("2")
    assert source(tmp_path) == Source(clean.commit, True)


def test_a_dirty_tree_is_not_published(monkeypatch, capsys):
    monkeypatch.setattr(run, "source", lambda: Source("c0ffee", True))
    assert run.main(["--suite", "cpu", "--subjects", SUBJECTS, "--publish"]) == 2
    assert "publish needs a clean tree" in capsys.readouterr().err


def test_the_page_says_what_the_results_say(monkeypatch, tmp_path):
    monkeypatch.setitem(report.REASONS, "twice as fast as adding", "adding is fast.")
    row = ROWS["right"]
    about = scheduler._record(row, Plan(suite="cpu"), CLEAN, PROBE)
    measured = about | {"subject": "lookup"} | record_of("right")
    lost = about | {"row": "lost/row", "status": "lost", "reason": "Segmentation fault\nkilled by SIGSEGV"}
    text = report.page({"cpu": {"rows": [measured, lost]}})
    ours = measured["contenders"][0]
    assert f"| {ours['median_us']:,.1f} (" in text
    assert "a device, 1 threads; Python 3.11, torch 2; 10.0 GB/s" in text
    assert "`lost/row`: lost, killed by SIGSEGV" in text
    assert "absent: unavailable, it is not installed" in text


def test_the_page_of_parity_shows_every_export_of_the_committed_results():
    assert export_parity.main(["--check"]) == 0
    exports = json.loads(export_parity.RESULTS.read_text())["exports"]
    rows = [line for line in export_parity.PAGE.read_text().splitlines() if line.count(" of ") == 1 and line[0] == "|"]
    assert len(rows) == len(exports) > 100


def test_the_committed_page_is_that_of_the_committed_results():
    assert report.main(["--check"]) == 0


def test_the_page_says_why_a_goal_is_missed(monkeypatch):
    rows = json.loads((report.RESULTS / "cpu.json").read_text())["rows"]
    row = next(row for row in rows if row["status"] == "measured")
    goal = {"goal": "as quick as light", "value": 2.0, "quantity": "speedup", "reached": False}
    monkeypatch.setitem(report.REASONS, goal["goal"], "it is not light.")
    missed = report.page({"cpu": {"rows": [{**row, "goals": [goal]}]}})
    assert "Why goals are missed:\n\n- as quick as light: it is not light.\n" in missed
    assert "Why goals" not in report.page({"cpu": {"rows": [{**row, "goals": [{**goal, "reached": True}]}]}})
    with pytest.raises(KeyError, match="no reason yet"):
        report.page({"cpu": {"rows": [{**row, "goals": [{**goal, "goal": "no reason yet"}]}]}})


def test_every_row_of_both_suites_can_be_named():
    from benchmarks import subjects

    for suite in ("cpu", "gpu"):
        names = [row.name for row in subjects.rows(suite)]
        assert len(set(names)) == len(names)
        rehearsed = [row.name for row in subjects.rows(suite, rehearse=True)]
        assert {name.partition("/")[0] for name in rehearsed} == {name.partition("/")[0] for name in names}
    assert replace(subjects.rows("gpu")[0], priority=0) in subjects.rows("gpu")  # the most important first


def test_zipf_indices_are_in_range_and_have_hot_rows():
    from benchmarks.subjects.shapes import Indices

    n, e = 1000, 4
    indices = Indices("zipf", n=n, e=e, device=torch.device("cpu")).draw(200, 50)
    assert indices.min() >= 0
    assert indices.max() < n * e
    count = torch.bincount(indices.flatten() % n, minlength=n)
    assert 0.08 < count.max() / count.sum() < 0.12  # log(2) / log(1001)
    assert len(torch.unique(indices // n)) == e


@pytest.mark.parametrize(
    "bare",
    [pytest.param(False, id="", marks=pytest.mark.slow), pytest.param(True, id="with torch, triton and pytest alone")],
)
def test_the_gpu_script_rehearses(tmp_path, bare):
    """A few rows of it here; CI runs `make gpu-dry-run`, which is all of them."""
    pytest.importorskip("triton")
    environment = dict(os.environ) | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    if bare:
        # NumPy stays: Triton's interpreter needs it.
        absent = ("rich", "safetensors", "onnx", "onnxscript", "onnxruntime", "xdist", "matplotlib", "fbgemm_gpu")
        hide = "".join(f"sys.modules[{name!r}] = None\n" for name in absent)
        (tmp_path / "sitecustomize.py").write_text(f"import sys\n{hide}")
        environment["PYTHONPATH"] = str(tmp_path)
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        command = ["--subjects", "benchmarks.subjects", "--rows", "update"]
    else:
        command = ["--subjects", SUBJECTS, "--no-tests"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--minutes", "9", *command]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    last = json.loads(process.stdout.splitlines()[-1])
    document = json.loads(Path(last["file"]).read_text())
    status = {row["subject"]: row["status"] for row in document["rows"]}
    if bare:
        assert process.returncode == 0, process.stdout + process.stderr
        assert status == {"update": "measured"}
        assert [test["status"] for test in document["tests"]] == ["passed"]
    else:
        assert process.returncode == 1
        assert (status["crash"], status["last"]) == ("lost", "measured")
        assert "A REHEARSAL" in process.stdout
    assert gpu.is_good(document) is bare
    assert all(row["rehearsal"] for row in document["rows"])
