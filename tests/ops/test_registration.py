from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from ultramem.ops._registration import traceable_op

@traceable_op("ultramem_test::scale")
def scale(x: torch.Tensor) -> torch.Tensor:
    return x * FACTOR

print(torch.compile(lambda x: torch.ops.ultramem_test.scale(x) + 1, fullgraph=True)(torch.ones(3)).tolist())
"""


def test_an_edited_op_is_not_served_from_the_graph_cache(tmp_path: Path) -> None:
    pytest.importorskip("triton")  # without it torch hashes no kernels
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    program = tmp_path / "program.py"
    for factor, expected in ((2.0, "[3.0, 3.0, 3.0]"), (5.0, "[6.0, 6.0, 6.0]")):
        program.write_text(PROGRAM.replace("FACTOR", str(factor)))
        command = [sys.executable, program]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1] == expected
