"""What was asked, in order."""

from __future__ import annotations

from typing import Any, NamedTuple


class Call(NamedTuple):
    """Of a method, or an attribute that was set."""

    name: str
    arguments: tuple[Any, ...]


CALLS: list[Call] = []


def record(name: str, *arguments: Any) -> None:
    CALLS.append(Call(name, arguments))


class Strict:
    """An object of which only attributes that its class declares can be set."""

    __slots__ = ()
