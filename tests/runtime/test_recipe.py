"""What a training command asks for: preset, file, flags, and errors that name the field."""

import dataclasses
import json

import pytest

from ultramem import preset
from ultramem.cli import main
from ultramem.runtime.recipe import make_recipe

TOML = """
preset = "ultramem-tiny"
data = "austen"

[train]
steps = 7
lr = 1

[model]
dropout = 0.25

[model.memory]
top_m = 8
candidates = "two_tailed"
"""


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(TOML)
    return path


def test_a_file_overrides_its_preset(toml):
    recipe = make_recipe(file=toml)
    tiny = preset("ultramem-tiny")
    memory = dataclasses.replace(tiny.memory, top_m=8, candidates="two_tailed")
    assert recipe.model == dataclasses.replace(tiny, dropout=0.25, memory=memory)
    assert (recipe.train.steps, recipe.train.lr, recipe.data) == (7, 1.0, "austen")


def test_the_command_line_wins(toml):
    settings = ["model.memory.top_m=4", "model.memory.candidates = one_tailed", "train.lr=2e-3", "train.steps=9"]
    recipe = make_recipe(file=toml, data="other.txt", train={"steps": 8}, settings=settings)
    assert (recipe.model.memory.top_m, recipe.model.memory.candidates) == (4, "one_tailed")
    assert (recipe.train.lr, recipe.train.steps, recipe.data) == (2e-3, 8, "other.txt")
    assert recipe.model.dropout == 0.25


def test_a_preset_on_the_command_line_keeps_the_file_s_overrides(toml):
    toml.write_text(TOML.partition("[model.memory]")[0])
    recipe = make_recipe(file=toml, preset="dense-tiny")
    assert recipe.model == dataclasses.replace(preset("dense-tiny"), dropout=0.25)


def test_training_options_may_stand_at_the_top(tmp_path):
    path = tmp_path / "flat.toml"
    path.write_text("steps = 3\nprecision = 'bfloat16'")
    recipe = make_recipe(file=path, preset="dense-tiny", data="austen")
    assert (recipe.train.steps, recipe.train.precision) == (3, "bfloat16")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[model]\ndropot = 0.1", "unknown field 'dropot' of ModelConfig"),
        ("[model.memory]\ntop_k = 8", "unknown field 'top_k' of MemoryConfig"),
        ("[model.memory]\ntop_m = '8'", "MemoryConfig.top_m must be of type int, got '8'"),
        ("[model.memory]\ntop_m = 0", "top_m must be at least 1, got 0"),
        ("[train]\nstepps = 8", "unknown field 'stepps' of TrainConfig"),
        ("[trian]\nsteps = 8", "unknown field 'trian' of TrainConfig"),
        ("train = 3", "train must be a table, got 3"),
        ("steps = 3\n[train]\nsteps = 3", "steps stands both at the top and in [train]"),
    ],
)
def test_errors_of_a_file_name_the_field(tmp_path, content, said):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the text is checked below, without escaping it
        make_recipe(file=path, preset="ultramem-tiny", data="austen")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.memory.top_m", "set must look like model.memory.top_m=8"),
        ("top_m=8", "set must look like"),
        ("data.name=x", "set must look like"),
        ("model.memory.top_k=8", "unknown field 'top_k'"),
        ("model.memory.top_m=eight", "top_m must be of type int, got 'eight'"),
        ("model.memory.candidates=both", "candidates must be one of one_tailed, two_tailed, got 'both'"),
    ],
)
def test_errors_of_a_setting_name_the_field(setting, said):
    with pytest.raises(ValueError, match=said):
        make_recipe(preset="ultramem-tiny", data="austen", settings=[setting])


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="preset must be given"):
        make_recipe(data="austen")
    with pytest.raises(ValueError, match="data must be given"):
        make_recipe(preset="dense-tiny")


def test_a_run_is_repeated_from_its_config(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("She was the youngest of the two daughters. " * 30)
    words = ["train", "--preset", "ultramem-tiny", "--data", str(text), "--out", str(tmp_path / "first")]
    options = ["--steps", "2", "--batch-size", "2", "--sequence-length", "16", "--no-compile", "--lr", "3e-3"]
    sizes = ["--set", "model.memory.knum=16", "--set", "model.memory.top_m=4", "--set", "model.inner_size=32"]
    assert main([*words, *options, *sizes]) == 0
    config = tmp_path / "first/config.json"
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "second")]) == 0
    assert json.loads((tmp_path / "second/config.json").read_text()) == json.loads(config.read_text())
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    text.write_text("Quite another text. " * 30)
    capsys.readouterr()
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "third")]) == 2
    assert "sha256 differs" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()
