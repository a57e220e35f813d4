"""Ownership on grids of any shape: a partition of the stock axes, in TP order, that brings everything back."""

from hypothesis import given
from hypothesis import strategies as st

from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.grid.ownership import SlicedAxis, proj_columns, qkv_rows
from hp_plugin.grid.ranks import Grid, tensor_parallel_groups
from tests.shapes import EXAMPLES, grid_shapes

AXES = ("tp", "cp", "dp", "pp")


def axes(shape: AttentionShape) -> list[SlicedAxis]:
    h, g, d, m, n = shape.h, shape.g, shape.d, shape.m, shape.n
    return [qkv_rows(h, g, d, m, n, shape.gate), proj_columns(h, d, m, n)]


@EXAMPLES
@given(grid_shapes())
def test_every_index_has_one_owner_and_all_own_equally_many(shape: AttentionShape) -> None:
    for axis in axes(shape):
        parts = [axis.owned(i, j) for i in range(shape.m) for j in range(shape.n)]
        assert sorted(index for part in parts for index in part) == list(range(axis.global_size))
        assert {len(part) for part in parts} == {axis.local_size}
        assert axis.local_size * shape.m * shape.n == axis.global_size


@EXAMPLES
@given(grid_shapes())
def test_what_is_cut_by_the_permutation_comes_back(shape: AttentionShape) -> None:
    """As initialization and checkpoints do it: permute, give each TP rank an even part, and put the parts back."""
    grid = Grid(shape.m, shape.n)
    for axis in axes(shape):
        whole = [f"stock {index}" for index in range(axis.global_size)]
        order = axis.permutation()
        cut = [whole[index] for index in order]
        parts = [cut[r * axis.local_size : (r + 1) * axis.local_size] for r in range(grid.size)]
        for r, part in enumerate(parts):
            i, j = grid.coordinates(r)
            assert part == [whole[index] for run in axis.runs(i, j) for index in run]
        back: dict[int, str] = {}
        for r, part in enumerate(parts):
            back.update(zip(axis.owned(*grid.coordinates(r)), part, strict=True))
        assert [back[index] for index in range(axis.global_size)] == whole


@EXAMPLES
@given(grid_shapes())
def test_traded_slices_are_contiguous_parts_of_the_stock_axis(shape: AttentionShape) -> None:
    """By the runs that a slice and a part share, every part is filled once, in stock order."""
    for axis in axes(shape):
        for i in range(shape.m):
            whole = [index for j in range(shape.n) for index in axis.owned(i, j)]
            parts = [[-1] * axis.local_size for _ in range(shape.n)]
            for j in range(shape.n):
                runs = axis.runs(i, j)
                for k in range(shape.n):
                    slots, places = axis.shared_runs(j, k)
                    for slot, place in zip(slots, places, strict=True):
                        start = place * axis.local_width
                        parts[k][start : start + axis.local_width] = runs[slot]
            assert [index for part in parts for index in part] == sorted(whole)


@EXAMPLES
@given(grid_shapes())
def test_a_rank_projects_the_heads_and_channels_that_it_queries(shape: AttentionShape) -> None:
    """The columns of the projection that a rank owns are the (head, channel) pairs of its rows of queries, in order."""
    rows, columns = axes(shape)
    per_group, slots = shape.h // shape.g, rows.slots // shape.g
    for i in range(shape.m):
        for j in range(shape.n):
            queries = []
            for row in rows.owned(i, j):
                slot, channel = divmod(row, shape.d)
                group, place = divmod(slot, slots)
                if place < per_group:
                    queries.append((group * per_group + place, channel))
            assert [divmod(column, shape.d) for column in columns.owned(i, j)] == queries


@EXAMPLES
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_any_head_group_and_any_dim_group_share_one_rank(m: int, n: int, first: int) -> None:
    grid, group = Grid(m, n), list(range(first, first + 3 * m * n, 3))
    heads, dims = grid.head_groups(group), grid.dim_groups(group)
    assert (len(heads), len(dims)) == (n, m)
    for j, by_head in enumerate(heads):
        for i, by_dim in enumerate(dims):
            (shared,) = set(by_head) & set(by_dim)
            assert shared == group[grid.tp_rank(i, j)]
            assert grid.coordinates(group.index(shared)) == (i, j)


@EXAMPLES
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.permutations(["tp", "cp", "dp", "pp"]),
)
def test_tensor_parallel_groups_share_the_world_out(tp: int, pp: int, cp: int, dp: int, order: list[str]) -> None:
    sizes = {"tp": tp, "pp": pp, "cp": cp, "dp": dp}
    world = tp * pp * cp * dp
    groups = tensor_parallel_groups(world, tp, pp, cp, "-".join(order))
    assert sorted(rank for group in groups for rank in group) == list(range(world))
    for group in groups:
        # Ranks of a group differ in their TP coordinate alone.
        coordinates = []
        for rank in group:
            found = {}
            for axis in order:
                rank, found[axis] = divmod(rank, sizes[axis])
            coordinates.append(found)
        assert [found.pop("tp") for found in coordinates] == list(range(tp))
        assert all(found == coordinates[0] for found in coordinates)
