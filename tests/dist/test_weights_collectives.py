"""The two collectives of `weights`, as gloo is given them and as NCCL is: what they make, of odd shapes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hp_plugin.exchange.weights.shards import Shard, start_gathering, start_reducing
from tests.ranks import Ranks

# Shape of a rank's shard, its axis, the runs of that axis: weights split on either axis, a bias, one element.
PARTS = [((12, 5), 0, 4), ((7, 9), 1, 3), ((10,), 0, 2), ((3, 4), 1, 1), ((1, 1), 0, 1)]


def shard_of(rank: int, part: int) -> Tensor:
    return torch.randn(PARTS[part][0], generator=torch.Generator().manual_seed(100 * rank + part))


def gradient_of(rank: int, part: int, n: int) -> Tensor:
    shape = list(PARTS[part][0])
    shape[PARTS[part][1]] *= n
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + 100 * rank + part))


def both_ways(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """Wholes of this rank, and its shards of the sums of gradients."""
    rank, n, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None
    holders = []
    for number, (_, axis, runs) in enumerate(PARTS):
        module = nn.Module()
        module.weight = nn.Parameter(shard_of(rank, number))
        holders.append(Shard(module, "weight", axis, runs, n))
    # Over gloo all the same, which does as NCCL would.
    with mock.patch.object(dist, "get_backend", return_value=backend):
        wholes = start_gathering(holders, group)()
        sums = start_reducing(holders, [gradient_of(rank, number, n) for number in range(len(PARTS))], group)()
    return [whole.contiguous() for whole in wholes], [one.contiguous() for one in sums]


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_wholes_and_sums_are_those_of_the_formula(ranks: Ranks, n: int, backend: str) -> None:
    found = ranks.run(n, both_ways, backend)
    for number, (_, axis, runs) in enumerate(PARTS):
        pieces = [shard_of(rank, number).chunk(runs, axis) for rank in range(n)]
        whole = torch.cat([piece[run] for run in range(runs) for piece in pieces], axis)
        total = torch.stack([gradient_of(rank, number, n) for rank in range(n)]).sum(0).chunk(runs * n, axis)
        for rank, (wholes, sums) in enumerate(found):
            assert torch.equal(wholes[number], whole)
            torch.testing.assert_close(sums[number], torch.cat([total[run * n + rank] for run in range(runs)], axis))
