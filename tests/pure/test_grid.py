"""Every rank of many worlds, by enumeration."""

from itertools import chain, product

import pytest

from hp_plugin.grid.ranks import DIM_INNERMOST, HEAD_INNERMOST, ORDERS, Grid, tensor_parallel_groups


@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 5), (2, 2), (4, 1), (1, 4), (5, 3)])
def test_coordinates_are_a_bijection(m: int, n: int) -> None:
    grid = Grid(m, n)
    assert [grid.coordinates(r) for r in range(grid.size)] == list(product(range(m), range(n)))
    assert all(grid.tp_rank(*grid.coordinates(r)) == r for r in range(grid.size))


@pytest.mark.parametrize(("m", "n"), [(3, 5), (2, 2), (2, 3), (5, 3)])
def test_head_innermost_ranks_count_the_heads_first(m: int, n: int) -> None:
    grid = Grid(m, n, HEAD_INNERMOST)
    assert grid.owners == [(i, j) for j, i in product(range(n), range(m))]
    assert all(grid.tp_rank(*owner) == r for r, owner in enumerate(grid.owners))
    assert grid != Grid(m, n) and str(grid) == f"{m},{n} head-innermost" and str(Grid(m, n)) == f"{m},{n}"
    # The neighbours are the ranks of one head group, as those of a dim group are otherwise.
    tp = [3 * r + 1 for r in range(grid.size)]
    assert grid.head_groups(tp) == [tp[j * m : (j + 1) * m] for j in range(n)]
    assert Grid(m, n).dim_groups(tp) == [tp[i * n : (i + 1) * n] for i in range(m)]


@pytest.mark.parametrize(("m", "n"), [(1, 4), (4, 1), (1, 1)])
def test_orders_are_one_where_an_axis_has_one_rank(m: int, n: int) -> None:
    assert Grid(m, n, HEAD_INNERMOST) == Grid(m, n) and Grid(m, n, HEAD_INNERMOST).order == DIM_INNERMOST


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("m", "n"), [(3, 2), (2, 2), (1, 4), (4, 1)])
def test_a_grid_is_found_from_its_groups(m: int, n: int, order: str) -> None:
    grid = Grid(m, n, order)
    tp = [5 * r + 2 for r in range(grid.size)]
    for head, dim in product(grid.head_groups(tp), grid.dim_groups(tp)):
        assert Grid.found(tp, head, dim) == grid


@pytest.mark.parametrize(("head", "dim"), [([0, 3], [0, 1]), ([0, 1], [0, 1, 2]), ([0, 1], [2, 1])])
def test_groups_that_are_no_grid_are_named(head: list[int], dim: list[int]) -> None:
    with pytest.raises(ValueError, match=r"are no head group and dim group of a grid over the TP group \[0, 1, 2, 3\]"):
        Grid.found([0, 1, 2, 3], head, dim)


def test_an_order_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="unknown head-dim-order 'heads': choose from dim-innermost, head-innermost"):
        Grid(1, 1, "heads")


def test_off_the_grid() -> None:
    with pytest.raises(ValueError, match="TP rank 6 is not on the 2 × 3 grid of 6 ranks"):
        Grid(2, 3).coordinates(6)
    with pytest.raises(ValueError, match=r"\(2, 0\) is not on the 2 × 3 grid"):
        Grid(2, 3).tp_rank(2, 0)
    with pytest.raises(ValueError, match="TP group of 4 ranks does not fill a 2 × 3 grid of 6"):
        Grid(2, 3).head_groups([0, 1, 2, 3])


@pytest.mark.parametrize(("m", "n"), [(3, 5), (2, 4), (1, 4), (4, 1)])
def test_groups_of_a_scattered_tp_group(m: int, n: int) -> None:
    grid = Grid(m, n)
    tp = [7 * r + 3 for r in range(grid.size)]  # any world ranks, as under order "dp-tp-pp"
    heads, dims = grid.head_groups(tp), grid.dim_groups(tp)
    assert len(heads) == n and len(dims) == m
    assert sorted(chain(*heads)) == sorted(chain(*dims)) == tp
    for r, rank in enumerate(tp):
        i, j = grid.coordinates(r)
        assert heads[j][i] == rank and dims[i][j] == rank
        assert set(heads[j]) & set(dims[i]) == {rank}


def brute_force(world: int, sizes: dict[str, int], order: str) -> list[list[int]]:
    """Label each rank with its coordinates, then collect those that differ in tp alone."""
    axes = order.split("-")
    labels = {}
    for rank in range(world):
        rest, label = rank, {}
        for axis in axes:
            rest, label[axis] = divmod(rest, sizes[axis])
        labels[rank] = label
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, label in labels.items():
        groups.setdefault(tuple(label[axis] for axis in axes if axis != "tp"), []).append(rank)
    return sorted(groups.values())


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp", "dp-tp-pp-cp-ep", "pp-dp-cp-tp-ep"])
@pytest.mark.parametrize(("tp", "pp", "cp", "dp"), [(4, 2, 1, 3), (15, 1, 1, 1), (2, 3, 2, 2), (6, 1, 2, 1)])
def test_tensor_parallel_groups(tp: int, pp: int, cp: int, dp: int, order: str) -> None:
    world = tp * pp * cp * dp
    expected = brute_force(world, {"tp": tp, "pp": pp, "cp": cp, "dp": dp, "ep": 1}, order)
    assert tensor_parallel_groups(world, tp, pp, cp, order) == expected


def test_bad_orders_and_worlds() -> None:
    with pytest.raises(ValueError, match="world size 10 is not a multiple of TP 4 × PP 2 × CP 1"):
        tensor_parallel_groups(10, 4, 2)
    with pytest.raises(ValueError, match=r"unknown: \['sp'\], missing: \['pp'\]"):
        tensor_parallel_groups(8, 2, 2, order="tp-sp-dp")
