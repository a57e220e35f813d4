from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.ranks import Ranks


FEW = 4
"""Cases of one test that are all run under --thin."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--thin`, with which `.ci/run` ends in time: it leaves out further cases of tests that it runs."""
    parser.addoption(
        "--thin",
        action="store_true",
        help=f"of a test with more than {FEW} cases, run every second one, always the same",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes them out as `-k` does, so that pytest counts them as deselected."""
    if not config.getoption("thin"):
        return
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = {item for family in cases.values() for item in family[:: 1 if len(family) <= FEW else 2]}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """`ranks.run(world_size, body, *args, timeout=...)` runs a module-level body on every rank."""
    # Here and not above: tests/pure is collected where torch is not installed.
    from tests.ranks import Ranks

    pools = Ranks()
    yield pools
    pools.close()
