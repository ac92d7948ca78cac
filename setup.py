"""The one step of the build that pyproject.toml cannot say: compiling the C++ kernels, if that is possible here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = Path("ultramem/ops/native")


def build_module() -> ModuleType:
    """`ultramem.ops.native.build`, by its path: the package itself needs PyTorch, which an isolated build hides."""
    spec = importlib.util.spec_from_file_location("ultramem_native_build", Path(__file__).parent / NATIVE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """An editable install gets the libraries beside their sources, a wheel inside it. Neither needs them."""

    def run(self) -> None:
        super().run()
        build = build_module()
        folder = build.FOLDER if self.editable_mode else Path(self.build_lib) / NATIVE
        try:
            for file in build.build(folder):
                print(f"built {file}")
        except (build.BuildError, OSError) as error:
            # Printed, for `pip -v`, and told again by the first forced use: plain PyTorch does all that they do.
            print(f"WARNING: no C++ kernels, plain PyTorch will run on the CPU: {error}")
            print(f"To build them later: {build.COMMAND}")


class KernelWheel(bdist_wheel):
    """The kernels are for one kind of machine, and for no Python in particular."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class KernelDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": KernelWheel},
    distclass=KernelDistribution,
)
