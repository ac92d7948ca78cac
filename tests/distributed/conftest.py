"""Groups of ranks that live as long as the test run."""

from collections.abc import Callable, Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(2).run(function, ...)` runs a function of a test's module on two ranks."""
    groups: dict[int, Ranks] = {}

    def group(size: int) -> Ranks:
        if size not in groups or not groups[size].is_open:
            groups[size] = Ranks(size)
        return groups[size]

    yield group
    for each in groups.values():
        each.close()
