"""`pytest --shard K/N`, by which `make gpu` runs a long file in several processes."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.harness.source import ROOT, without_paths

FAILING = "def test_wrong():\n    assert 1 == 2\n"
FILE = "tests/ops/test_permute_addresses.py"


def collected(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", FILE, *arguments]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line for line in output.splitlines() if "::" in line]


def test_every_test_is_in_one_shard():
    whole, first, second = collected(), collected("--shard", "1/2"), collected("--shard", "2/2")
    assert len(whole) > 50
    assert sorted(first + second) == sorted(whole)
    assert min(len(first), len(second)) > len(whole) / 4


def test_long_files_come_first_and_in_parts():
    shards = gpu.shards_of_tests(dry_run=False)
    sizes = [(gpu.ROOT / shard.file).stat().st_size for shard in shards]
    assert sizes == sorted(sizes, reverse=True)
    assert len({shard.file for shard in shards}) < len(shards)
    for shard in shards:
        numbers = [each.number for each in shards if each.file == shard.file]
        assert numbers == list(range(1, shard.parts + 1))


def test_engines_are_tested_where_all_that_they_need_is_there(monkeypatch):
    def files():
        return {shard.file for shard in gpu.shards_of_tests(dry_run=False)}

    assert set(gpu.ENGINE_TESTS) < files()
    monkeypatch.setattr(gpu, "NEEDED_BY_ENGINES", ("rich", "no_such_package"))
    assert not set(gpu.ENGINE_TESTS) & files()


def test_wanted_files_alone():
    shards = gpu.shards_of_tests(["update_rows", "test_gpu"], dry_run=False)
    assert {Path(shard.file).name for shard in shards} == {"test_update_rows.py", "test_gpu.py"}


def test_tests_that_are_not_there_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--tests", "nothing"])
    said = capsys.readouterr().err
    assert "--tests must name files of tests/ops, tests/optim, tests/graph/test_pinned_tables.py" in said
    assert "got 'nothing'" in said


def test_results_hold_no_folder_of_this_machine():
    library = Path(pytest.__file__)
    within = library.relative_to(sysconfig.get_path("purelib"))
    name = f"{library.parent}-2/x.py"  # another folder, whose name begins so
    text = without_paths(f'File "{library}", line 3; {ROOT}/tests/x.py; {ROOT}; {name}')
    assert text == f'File "{within}", line 3; tests/x.py; ; {within.parent}-2/x.py'


def test_a_failing_test_is_named_and_what_it_printed_kept_apart(tmp_path):
    (tmp_path / "test_failing.py").write_text(FAILING)
    logs = tmp_path / "tests.log"
    (record,) = gpu.run_tests([gpu.Shard(str(tmp_path / "test_failing.py"))], logs, limit_s=60, dry_run=True)
    assert record["status"] == "failed"
    (named,) = record["failed"]
    assert named["test"].endswith("::test_wrong")
    assert "assert 1 == 2" in named["message"]
    assert "log" not in record
    assert "1 failed" in logs.read_text()
