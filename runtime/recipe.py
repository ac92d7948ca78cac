"""What to train and how: a preset, a file, and what the command line sets on top.

A TOML file may hold `preset`, `data`, and the tables `[train]` and `[model]` (`[model.memory]`), which override the
fields of TrainConfig and of the preset; fields of TrainConfig may also stand at its top. Without a preset, `[model]` is
the whole model. A run's config.json is such a file too.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ultramem.config import FORMAT_VERSION, ModelConfig, TrainConfig, from_dict, to_dict
from ultramem.presets import preset as find_preset
from ultramem.presets import preset_training

SECTIONS = ("preset", "data", "data_sha256", "train", "model")


class Recipe(NamedTuple):
    """A training run before its text is read."""

    model: ModelConfig
    train: TrainConfig
    data: str
    data_sha256: str | None
    """What the text must hash to, where a run's config.json says so."""
    preset: str | None


def make_recipe(
    *,
    file: Path | None = None,
    preset: str | None = None,
    data: str | None = None,
    train: dict[str, Any] | None = None,
    settings: Sequence[str] = (),
) -> Recipe:
    """Defaults, then the preset (an ablation row may fix fields of TrainConfig too), then the file, then what is given.

    Args:
        file: TOML, or JSON where its name ends so.
        preset: name of a preset; replaces the file's.
        data: what to train on; replaces the file's.
        train: fields of TrainConfig.
        settings: like "model.memory.top_m=8" or "train.lr=1e-3", the value as in TOML, or a bare word.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not readable, or a field is unknown, missing or out of range; the message names it.
    """
    document = {} if file is None else _read(file)
    changes: dict[str, Any] = {}
    for setting in settings:
        _set(changes, setting)
    model, options = _section(document, "model"), _section(document, "train")
    options |= {name: value for name, value in document.items() if name not in SECTIONS}
    options = _merged(_merged(options, changes.get("train", {})), train or {})
    sha256 = document.get("data_sha256") if data is None else None
    preset, data = preset or document.get("preset"), data or document.get("data")
    if preset is not None:
        model = _merged(to_dict(find_preset(preset)), model)
        options = {**preset_training(preset), **options}
    model = _merged(model, changes.get("model", {}))
    if not model:
        raise ValueError("preset must be given, by --preset or in the file of --config (or all of [model] there)")
    if not isinstance(data, str):
        raise ValueError(f"data must be given, by --data or as a string in the file of --config, got {data!r}")
    return Recipe(from_dict(ModelConfig, model), from_dict(TrainConfig, options), data, sha256, preset)


def _read(file: Path) -> dict[str, Any]:
    is_json = file.suffix == ".json"
    try:
        document = json.loads(file.read_text()) if is_json else tomllib.loads(file.read_text())
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {file} is not UTF-8 text: {error}") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"config: {file} is not valid {'JSON' if is_json else 'TOML'}: {error}") from error
    if not is_json:
        return document
    if not isinstance(document, dict) or document.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"config: {file} is not the config.json of a run (format_version {FORMAT_VERSION})")
    data = _section(document, "data")
    return {
        "model": _section(document, "model"),
        "train": _section(document, "train"),
        "data": data.get("name"),
        "data_sha256": data.get("sha256"),
    }


def _section(document: dict[str, Any], name: str) -> dict[str, Any]:
    section = document.get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"config: {name} must be a table, got {section!r}")
    twice = sorted(section.keys() & document.keys()) if name == "train" else []
    if twice:
        raise ValueError(f"config: {twice[0]} stands both at the top and in [train]; keep one")
    return dict(section)


def _set(changes: dict[str, Any], setting: str) -> None:
    """Enter "a.b.c=value" into nested dicts."""
    path, equals, text = setting.partition("=")
    *parents, name = [part.strip() for part in path.split(".")]
    if not equals or not name or not parents or parents[0] not in ("model", "train"):
        raise ValueError(f"set must look like model.memory.top_m=8 or train.lr=1e-3, got {setting!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word; if the field is no string, its type says so
    here = changes
    for parent in parents:
        here = here.setdefault(parent, {})
    here[name] = value


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with nested `changes` on top."""
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
