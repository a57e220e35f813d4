"""Which rows and columns a rank owns, against the stock layout written out cell by cell."""

import pytest

from hp_plugin.grid.ownership import SlicedAxis, proj_columns, qkv_rows, slots_per_group
from hp_plugin.grid.ranks import ORDERS, Grid

SHAPES = [  # h, g, d, m, n
    (12, 3, 80, 3, 5),
    (12, 3, 80, 1, 16),
    (2, 2, 6, 2, 3),
    (4, 1, 8, 1, 4),
    (6, 6, 10, 2, 5),
    (16, 2, 8, 2, 1),
]


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(("h", "g", "d", "m", "n"), SHAPES)
def test_qkv_rows(h: int, g: int, d: int, m: int, n: int, gate: bool) -> None:
    # The stock rows in order, each named by what it is: group, role within the group, channel.
    roles = [("q", k) for k in range(h // g)]
    roles += [("gate", k) for k in range(h // g)] if gate else []
    roles += [("k", 0), ("v", 0)]
    stock = [(group, *role, channel) for group in range(g) for role in roles for channel in range(d)]
    axis = qkv_rows(h, g, d, m, n, gate)
    assert axis.global_size == len(stock) == g * slots_per_group(h, g, gate) * d
    for i in range(m):
        for j in range(n):
            expected = [
                (group, *role, channel)
                for group in range(i * g // m, (i + 1) * g // m)
                for role in roles
                for channel in range(j * d // n, (j + 1) * d // n)
            ]
            assert [stock[row] for row in axis.owned(i, j)] == expected
            assert len(expected) == axis.local_size == axis.global_size // (m * n)
            # One run per slot of the rank's head group: slice j of that slot, slots one behind the other.
            slots = len(roles) * g // m
            assert axis.runs(i, j) == [
                range(slot * d + j * d // n, slot * d + (j + 1) * d // n) for slot in range(i * slots, (i + 1) * slots)
            ]


@pytest.mark.parametrize(("h", "g", "d", "m", "n"), SHAPES)
def test_proj_columns(h: int, g: int, d: int, m: int, n: int) -> None:
    stock = [(head, channel) for head in range(h) for channel in range(d)]
    axis = proj_columns(h, d, m, n)
    for i in range(m):
        for j in range(n):
            heads, channels = range(i * h // m, (i + 1) * h // m), range(j * d // n, (j + 1) * d // n)
            assert [stock[column] for column in axis.owned(i, j)] == [(k, c) for k in heads for c in channels]


@pytest.mark.parametrize(("h", "g", "d", "m", "n"), SHAPES)
def test_every_row_has_one_owner_and_the_permutation_is_tp_order(h: int, g: int, d: int, m: int, n: int) -> None:
    axis = qkv_rows(h, g, d, m, n)
    order = axis.permutation()
    assert sorted(order) == list(range(axis.global_size))
    for r in range(m * n):
        assert order[r * axis.local_size : (r + 1) * axis.local_size] == axis.owned(*divmod(r, n))
    if n == 1:
        assert order == sorted(order), "whole heads are the stock layout"


def test_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="3 query groups do not divide over m = 2"):
        qkv_rows(12, 3, 80, 2, 5)
    with pytest.raises(ValueError, match="12 slots of 80 channels do not divide over a 3 × 7 grid"):
        SlicedAxis(12, 80, 3, 7)


@pytest.mark.parametrize("order", ORDERS)
def test_a_stock_tensor_in_the_order_of_the_ranks_splits_into_what_each_owns(order: str) -> None:
    grid, axis = Grid(2, 3, order), SlicedAxis(4, 6, 2, 3)
    permuted, size = axis.permutation(grid.owners), axis.local_size
    for r, owner in enumerate(grid.owners):
        assert permuted[r * size : (r + 1) * size] == axis.owned(*owner)
    assert sorted(permuted) == list(range(axis.global_size))
