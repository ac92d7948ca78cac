"""A stand-in for `tensorrt` and `tensorrt.plugin` that records what it is asked, for machines without TensorRT.

It has the names, arguments and rules of TensorRT 10 and 11 that this package uses (as the source of the Python bindings
11.4 and NVIDIA's documentation give them) and nothing else: a name that is misspelt, an argument that is not there and
an attribute that is set on the wrong object are errors. It is no TensorRT: its "engine" is the ONNX model, which
ONNX Runtime runs on the CPU by the bodies of our nodes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from benchmarks.tensorrt_stand_in import build, enums, plugin, runtime
from benchmarks.tensorrt_stand_in.record import CALLS


@contextlib.contextmanager
def stand_in() -> Iterator[ModuleType]:
    """`import tensorrt` gives the stand-in inside the block, with no plugin defined and nothing recorded."""
    module, plugins = ModuleType("tensorrt"), ModuleType("tensorrt.plugin")
    _fill(module, [*enums.ALL, build.Logger, build.Builder, build.OnnxParser, runtime.Runtime])
    _fill(plugins, plugin.PUBLIC)
    plugins.op = plugin.new_registry()  # type: ignore[attr-defined]
    module.plugin = plugins  # type: ignore[attr-defined]
    for each in (module, plugins):
        each.__spec__ = ModuleSpec(each.__name__, None)  # torch looks for it
    CALLS.clear()
    names = {"tensorrt": module, "tensorrt.plugin": plugins}
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        yield module
    finally:
        for name, found in before.items():
            if found is None:
                del sys.modules[name]
            else:
                sys.modules[name] = found


def _fill(module: ModuleType, members: list[Any]) -> None:
    for each in members:
        setattr(module, each.__name__, each)


__all__ = ["CALLS", "stand_in"]
