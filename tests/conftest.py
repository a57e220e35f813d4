from collections.abc import Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """`ranks.run(world_size, body, *args, timeout=...)` runs a module-level body on every rank."""
    pools = Ranks()
    yield pools
    pools.close()
