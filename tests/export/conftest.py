"""Exports that several files look at."""

import pytest
from exported import export_once


@pytest.fixture(scope="session")
def onnx_folder(tmp_path_factory):
    return export_once(tmp_path_factory, "onnx")


@pytest.fixture(scope="session")
def aoti_folder(tmp_path_factory):
    return export_once(tmp_path_factory, "aoti")
