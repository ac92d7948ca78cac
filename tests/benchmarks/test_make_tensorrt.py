"""`make tensorrt`, rehearsed, and what it says where there is no TensorRT."""

import json

from benchmarks import tensorrt as benchmark
from ultramem.export import tensorrt_plugins
from ultramem.ops.triton.ahead_of_time import Compiled


def test_without_tensorrt_it_says_so_and_measures_nothing(capsys):
    assert benchmark.main([]) == 2
    assert "TensorRT is not installed" in capsys.readouterr().err


def test_the_rehearsal_goes_the_whole_way(monkeypatch, tmp_path, capsys):
    # The interpreter cannot compile; `make tensorrt-dry-run` does.
    monkeypatch.setattr(tensorrt_plugins, "compile_ahead", lambda *given: Compiled("k", ".entry k(", b"", 128, 2048))
    (subject,) = benchmark.subjects(dry_run=True)
    only = benchmark.replace(subject, tables=(None,))
    monkeypatch.setattr(benchmark, "subjects", lambda dry_run: (only,))
    assert benchmark.main(["--dry-run", "--peers", "", "--rounds", "1", "--out", str(tmp_path / "rows.json")]) == 0
    document = json.loads((tmp_path / "rows.json").read_text())
    assert document["rehearsed"] is True
    assert [row["engine"] for row in document["rows"]] == ["tensorrt, plugin", "tensorrt, body"]
    for row in document["rows"]:
        assert row["max_error"] <= row["allowed"]
        assert row["device"] == "stand-in on a CPU"
        assert row["prefill_ms"] > 0
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == {"rehearsed": True, "rows": 2, "refused": 0}
    assert any(line.startswith("layer, tiny") for line in printed)


def test_a_refused_engine_is_a_row_and_an_exit_status(monkeypatch, capsys):
    row = benchmark.Row(subject="s", dtype="fp32", table=None, engine="e", device="", build_s=1.0, refused="no engine")
    monkeypatch.setattr(benchmark, "measure", lambda *given, **settings: [row])
    assert benchmark.main(["--dry-run", "--peers", ""]) == 1
    assert "no engine" in capsys.readouterr().out
