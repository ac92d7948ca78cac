"""Configs to and from JSON-ready dicts, and the checks that they share."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

FORMAT_VERSION = 1

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-ready nested dicts."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: dict[str, Any]) -> T:
    """Build a config from nested dicts.

    Raises:
        ValueError: an unknown or missing field, or a value of the wrong type, named in the message.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # cls is one of the dataclasses above
    for name in data:
        if name not in fields:
            raise ValueError(f"unknown field {name!r} of {cls.__name__}, accepted: {', '.join(fields)}")
    for name, field in fields.items():
        if name not in data and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{cls.__name__} needs the field {name!r}")
    return cls(**{name: _convert(f"{cls.__name__}.{name}", hints[name], value) for name, value in data.items()})


def _convert(name: str, hint: Any, value: Any) -> Any:
    """`value` as the type `hint`: nested configs, None, and ints given for floats."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    (option,) = [each for each in options if each is not type(None)]
    if dataclasses.is_dataclass(option) and isinstance(value, dict):
        return from_dict(typing.cast(type[Any], option), value)
    if typing.get_origin(option) is Literal:
        if value not in typing.get_args(option):
            raise ValueError(f"{name} must be one of {', '.join(map(str, typing.get_args(option)))}, got {value!r}")
        return value
    if option is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, option) or (option is int and isinstance(value, bool)):
        raise ValueError(f"{name} must be of type {option.__name__}, got {value!r}")
    return value


def require_fields_at_least(config: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def require_literals(config: Any) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal and getattr(config, name) not in typing.get_args(hint):
            accepted = ", ".join(map(str, typing.get_args(hint)))
            raise ValueError(f"{name} must be one of {accepted}, got {getattr(config, name)!r}")
