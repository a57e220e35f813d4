"""Slices to stock parts and back, by every kind of tensor that a checkpoint keeps, one at a time and together."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hp_plugin import cpu_backend
from hp_plugin.attention.registration import initialize_head_dim_parallel
from hp_plugin.checkpoint import trade
from hp_plugin.checkpoint.trade import from_stock_part, to_stock_part, together
from hp_plugin.config import HeadDimConfig
from hp_plugin.grid.groups import HeadDimGroups
from hp_plugin.grid.ownership import SlicedAxis
from hp_plugin.grid.ranks import HEAD_INNERMOST
from tests.ranks import Ranks

# n divides the slots of a head group, or not, or they are fewer than n.
SLOTS_OF_A_GROUP = (8, 6, 5, 3, 1)
DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.float64, torch.float8_e4m3fn)


def whole(axis: SlicedAxis, weight_axis: int, dtype: torch.dtype) -> Tensor:
    shape = [*[3, 5][:weight_axis], axis.global_size, *[3, 5][weight_axis:]]
    return torch.randint(100, shape, generator=torch.Generator().manual_seed(axis.slots)).to(dtype)


def cases(m: int, n: int) -> list[tuple[SlicedAxis, int, torch.dtype]]:
    return [
        (SlicedAxis(m * slots, 3 * n, m, n), weight_axis, dtype)
        for slots in SLOTS_OF_A_GROUP
        for weight_axis in (0, 1)
        for dtype in DTYPES
    ]


def equal(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def there_and_back(head_dim: HeadDimConfig, at_once: int | None) -> None:
    """All cases; with `at_once`, within `together`, that many bytes a collective."""
    cpu_backend.enable()
    initialize_head_dim_parallel(head_dim)
    groups = HeadDimGroups.from_collection(None)
    m, n = head_dim.m, head_dim.n
    i, j = groups.coordinates
    trade._AT_ONCE = at_once or trade._AT_ONCE
    stocks = [whole(*case) for case in cases(m, n)]
    weights = [
        # Not contiguous, as a view of an optimizer's buffer may be.
        stock.index_select(axis, torch.tensor(case.owned(i, j))).movedim(0, -1).contiguous().movedim(-1, 0)
        for stock, (case, axis, _) in zip(stocks, cases(m, n), strict=True)
    ]
    with together() if at_once else nullcontext():
        parts = [
            to_stock_part(weight, axis, case, groups.dim)
            for weight, (case, axis, _) in zip(weights, cases(m, n), strict=True)
        ]
    for stock, part, (_, axis, _) in zip(stocks, parts, cases(m, n), strict=True):
        assert equal(part, stock.chunk(m * n, axis)[i * n + j])
    with together() if at_once else nullcontext():
        backs = [
            from_stock_part(part, axis, case, groups.dim)
            for part, (case, axis, _) in zip(parts, cases(m, n), strict=True)
        ]
    for weight, back in zip(weights, backs, strict=True):
        assert equal(back, weight)


@pytest.mark.parametrize("at_once", [None, 1, 1000, 2**28])
@pytest.mark.parametrize(
    "head_dim", [HeadDimConfig(2, 2), HeadDimConfig(1, 4), HeadDimConfig(2, 2, order=HEAD_INNERMOST)]
)
def test_traded_slices_are_stock_parts(ranks: Ranks, head_dim: HeadDimConfig, at_once: int | None) -> None:
    ranks.run(4, there_and_back, head_dim, at_once)


def counted(m: int, n: int) -> list[int]:
    cpu_backend.enable()
    initialize_head_dim_parallel(HeadDimConfig(m, n))
    groups, axis = HeadDimGroups.from_collection(None), SlicedAxis(4 * m, 2 * n, m, n)
    sent: list[int] = []
    original = dist.all_to_all_single

    def count(received: Tensor, given: Tensor, *args: object) -> None:
        sent.append(given.numel())
        original(received, given, *args)

    dist.all_to_all_single = count
    try:
        with together():
            for _ in range(10):
                to_stock_part(torch.ones(axis.local_size, 2), 0, axis, groups.dim)
    finally:
        dist.all_to_all_single = original
    return sent


def test_ten_tensors_take_one_collective(ranks: Ranks) -> None:
    # 8 channels by 2 numbers of 4 bytes
    assert ranks.run(4, counted, 2, 2) == [[10 * 8 * 2 * 4]] * 4
