"""An export does not hold a table twice: what it takes beside the model does not grow with the table."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

CODE = """
    import json, sys, threading, time
    from dataclasses import replace
    sys.path.insert(0, {tests!r})
    from exported import DENSE, MEMORY
    import ultramem
    from ultramem.export import ExportOptions, export_model

    def anonymous():
        status = open("/proc/self/status").read()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    def export(knum, name):
        memory = replace(
            MEMORY, num_layers=1, permutation="none", knum=knum, value_dim=256, num_heads=1, top_m=2, init="released"
        )
        config = replace(DENSE, hidden_size=32, inner_size=48, memory=memory, insertions="1:1")
        model = ultramem.build_model(config).eval()
        before, peak, done = anonymous(), [0], []

        def watch():
            while not done:
                peak[0] = max(peak[0], anonymous())
                time.sleep(0.01)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            export_model(model, {engine!r}, {folder!r} + name, options=ExportOptions(**{options!r}))
        finally:
            done.append(True)
            watcher.join()
        return model.memories[0].table.values_NV.nbytes, peak[0] - before

    export(8, "warm")  # libraries
    print(json.dumps(export({knum}, "large")))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "options", "copies", "knum"),
    [
        ("onnx", {}, 0, 1024),
        ("aoti", {}, 0, 1024),
        ("onnx", {"table": "int8"}, 0.25, 1024),
        ("aoti", {"dtype": "bf16"}, 0.5, 1024),
        # 2.96e9 elements, over a quarter of the rows behind element 2^31
        ("onnx", {"table": "int8"}, 0.25, 3400),
        ("aoti", {"table": "int8"}, 0.25, 3400),
    ],
)
def test_an_export_takes_a_fifth_of_the_table_beside_it(tmp_path, engine, options, copies, knum):
    """Tables of 1 GB and of 11.8 GB; rounded rows are a copy that is wanted. Parity reads rows from all over."""
    code = CODE.format(
        tests=str(Path(__file__).parents[1]), engine=engine, options=options, folder=str(tmp_path / "out"), knum=knum
    )
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    table_bytes, extra = json.loads(done.stdout.splitlines()[-1])
    assert table_bytes == knum**2 * 256 * 4
    assert extra < (copies + 0.2) * table_bytes
    print(engine, options, f"table {table_bytes:,} bytes, {extra / table_bytes:.3f} of it beside the model")
