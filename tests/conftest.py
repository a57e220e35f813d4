from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """`ranks.run(world_size, body, *args, timeout=...)` runs a module-level body on every rank."""
    # Here and not above: tests/pure is collected where torch is not installed.
    from tests.ranks import Ranks

    pools = Ranks()
    yield pools
    pools.close()
