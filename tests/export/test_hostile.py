"""An export folder that was damaged, or made to do harm, is refused in one line and runs nothing of its own.

Whoever can change a file can change the manifest's hashes too: `sign` does.
"""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import onnx
import pytest
from exported import CONFIG, DENSE, build

from ultramem.export import export_model, load_artifact
from ultramem.export.aot_inductor import check_package
from ultramem.export.manifest import file_record
from ultramem.export.onnx import export_onnx


@pytest.fixture(scope="module")
def external_folder(tmp_path_factory):
    """An ONNX export whose weights are in a file of their own."""
    folder = tmp_path_factory.mktemp("external") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(export_onnx.__kwdefaults__, "external_bytes", 1000)
        export_model(build(DENSE), "onnx", folder)
    return folder


@pytest.fixture
def copy(external_folder, tmp_path):
    shutil.copytree(external_folder, tmp_path / "copy")
    return tmp_path / "copy"


def edit(folder, change):
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def sign(folder, *names):
    def write(document):
        for name in names:
            record = file_record(folder / name)
            document["files"][name] = {"bytes": record.bytes, "sha256": record.sha256}

    edit(folder, write)


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as error:
        load_artifact(folder)
    assert "\n" not in str(error.value)


def test_the_whole_folder_is_loaded(copy):
    assert sorted(path.name for path in copy.iterdir()) == ["manifest.json", "model.onnx", "model.onnx.data"]
    assert load_artifact(copy)


def test_missing_external_data(copy):
    (copy / "model.onnx.data").unlink()
    refused(copy, "model.onnx.data is missing")
    edit(copy, lambda document: document["files"].pop("model.onnx.data"))
    refused(copy, "model.onnx is refused by ONNX Runtime")


def test_truncated_external_data(copy):
    path = copy / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-100])
    refused(copy, "model.onnx.data has .* bytes, the manifest says")
    sign(copy, "model.onnx.data")
    refused(copy, "model.onnx is refused by ONNX Runtime")


def test_swapped_tables(copy):
    path = copy / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[:2048], data[2048:4096] = data[2048:4096], data[:2048]
    path.write_bytes(data)
    refused(copy, "model.onnx.data was altered after the export: its sha256 differs")


def test_external_data_that_the_manifest_does_not_know(copy):
    edit(copy, lambda document: document["files"].pop("model.onnx.data"))
    refused(copy, "model.onnx.data is not in the manifest")


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "../copy/../secret"])
def test_external_data_outside_of_the_folder(copy, location):
    shutil.copy(copy / "model.onnx.data", copy.parent / "secret")
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    sign(copy, "model.onnx")
    refused(copy, "model.onnx is refused by ONNX Runtime")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "manifest.json", "a\\b"])
def test_a_manifest_with_a_path_that_leaves_the_folder(copy, name):
    edit(copy, lambda document: document["files"].update({name: {"bytes": 1, "sha256": ""}}))
    refused(copy, "is damaged: files must be names in the folder itself")


def test_a_manifest_with_a_file_of_another_engine(copy):
    (copy / "model.pt2").write_bytes(b"x")
    sign(copy, "model.pt2")
    refused(copy, r"is damaged: files must be of model.onnx, model.onnx.data, the first always, got .*model.pt2")


@pytest.mark.parametrize("field", ["options", "model", "parity", "inputs", "passes"])
@pytest.mark.parametrize("value", [None, 7, [1], {"a": 1}])
def test_a_manifest_with_other_fields(copy, field, value):
    edit(copy, lambda document: document.update({field: value}))
    refused(copy, "manifest.json is damaged")


def test_a_graph_that_is_no_protobuf(copy):
    (copy / "model.onnx").write_bytes(b"\x00" * 500)
    sign(copy, "model.onnx")
    refused(copy, "model.onnx is refused by ONNX Runtime")


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize(
    "entry",
    [
        "model/data/constants/model_constants_config.json",
        "model/data/weights/weight_0",
        "model/models/model.json",
        "model/data/aotinductor/model/weights_config.json",
        "model/data/aotinductor/model/../../../../harm",
        "../harm",
        "model/data/sample_inputs/model.pt",
        "model/extra/harm",
    ],
)
def test_a_package_that_holds_more_than_code(copy, entry):
    """What torch would unpickle, or write elsewhere, is never looked at."""
    harmed = copy.parent / "harmed"
    with zipfile.ZipFile(copy / "model.pt2", "w") as archive:
        archive.writestr("model/archive_format", "pt2")
        archive.writestr("model/archive_version", "0")
        archive.writestr("model/data/aotinductor/model/a.wrapper.so", b"")
        archive.writestr(entry, pickle.dumps(Payload(harmed)))
    for name in ("model.onnx", "model.onnx.data"):
        (copy / name).unlink()
    edit(copy, lambda document: document.update(engine="aoti", files={}))
    sign(copy, "model.pt2")
    refused(copy, "model.pt2 must hold code of AOTInductor alone, got")
    assert not harmed.exists()
    pickle.loads(pickle.dumps(Payload(harmed)))  # it would have worked
    assert harmed.exists()


def test_a_package_that_is_no_archive(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"model\.pt2 is not a package"):
        check_package(tmp_path / "model.pt2")


def test_a_whole_package_passes(aoti_folder):
    check_package(aoti_folder / "model.pt2")
    assert load_artifact(aoti_folder).manifest.model == CONFIG
