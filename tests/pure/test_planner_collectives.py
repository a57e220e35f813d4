"""Times of collectives: the measured ones where measured, never faster than physics elsewhere."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hp_plugin.planner.machine.collectives import KINDS, Collectives, wire_factor
from hp_plugin.planner.machine.curve import TimeCurve
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.machine.placement import Placement, placements

H100 = load_hardware("h100-ib")
ONE_NODE = load_hardware("h100-nvlink")
MIB = 2**20


def test_measured_sizes_come_back() -> None:
    # DGX H100, 8 GPUs: 16 MiB in 123.8 µs, 1 GiB in 4029.4 µs.
    eight = Placement(8, 1, 8)
    assert H100.collectives.seconds("all_reduce", 16 * MIB, eight) == pytest.approx(123.8e-6)
    assert H100.collectives.seconds("all_reduce", 1024 * MIB, eight) == pytest.approx(4029.4e-6)
    # 16 H100 over InfiniBand: 100 MiB in 639 µs.
    assert H100.collectives.seconds("all_reduce", 100 * MIB, Placement(16, 2, 8)) == pytest.approx(639e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "group",
    [
        Placement(*sizes)
        for sizes in (
            (2, 1, 2), (3, 1, 3), (8, 1, 8), (16, 1, 16), (16, 2, 8), (4, 2, 2), (2, 2, 1), (48, 48, 1), (64, 8, 8),
        )
    ],
)  # fmt: skip
def test_larger_transfers_take_longer_and_bandwidth_stays_physical(kind: str, group: Placement) -> None:
    times = [H100.collectives.seconds(kind, 2.0**power, group) for power in range(10, 34)]
    assert all(later >= earlier for earlier, later in pairwise(times))
    bus = 2.0**33 * wire_factor(kind, group.size) / times[-1]
    # 8 GPUs with NVLS reach 480 GB/s of bus bandwidth, nothing measured exceeds 490.
    assert bus < 490e9
    if group.domains > 1 and kind in ("all_gather", "reduce_scatter", "send_recv"):
        assert bus <= group.per_domain * 50e9 * 1.02, "a ring cannot beat the NICs of a domain"


def test_fewer_nics_and_more_domains_cost_more() -> None:
    size = 256.0 * MIB
    for kind in ("all_gather", "reduce_scatter", "all_reduce"):
        full, half, one = (H100.collectives.seconds(kind, size, Placement(2 * per, 2, per)) for per in (8, 4, 1))
        assert full < half < one
        two, many = (H100.collectives.seconds(kind, size, Placement(8 * n, n, 8)) for n in (2, 32))
        assert two < many


def test_half_of_a_two_node_all_to_all_crosses_one_nic_per_gpu() -> None:
    size = 8.0 * 1024 * MIB
    seconds = H100.collectives.seconds("all_to_all", size, Placement(16, 2, 8))
    assert seconds == pytest.approx(size / 2 / 48.5e9, rel=0.05)


def test_nothing_moves_in_a_group_of_one_or_without_bytes() -> None:
    for kind in KINDS:
        assert H100.collectives.seconds(kind, 1e9, Placement(1, 1, 1)) == 0.0
        assert H100.collectives.seconds(kind, 0, Placement(8, 1, 8)) == 0.0


def test_sixteen_gpus_behind_one_switch_beat_two_nodes() -> None:
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        for size in (1.0 * MIB, 64.0 * MIB, 4096.0 * MIB):
            switch = ONE_NODE.collectives.seconds(kind, size, Placement(16, 1, 16))
            assert switch <= H100.collectives.seconds(kind, size, Placement(16, 2, 8)), (kind, size)
            assert switch > ONE_NODE.collectives.seconds(kind, size, Placement(8, 1, 8)), (kind, size)


def test_a_machine_needs_every_kind_of_collective() -> None:
    curve = TimeCurve.from_points([(1, 1.0)])
    with pytest.raises(ValueError, match="no measured curve for all_gather"):
        Collectives({("all_reduce", 2, 1): curve}, H100.collectives.links)
    with pytest.raises(ValueError, match="unknown collectives broadcast"):
        Collectives({("broadcast", 2, 1): curve}, H100.collectives.links)


def test_wire_factors() -> None:
    assert wire_factor("all_reduce", 4) == 1.5
    assert wire_factor("all_gather", 4) == 0.75
    assert wire_factor("send_recv", 2) == 1.0


def test_placement_of_a_grid_over_two_nodes() -> None:
    """16 ranks, 4 × 4: a dim group is 4 neighbours, a head group strides by 4 and has two ranks in each node."""
    groups = placements(16, 1, 1, 1, 8, 4, 4, 8)
    assert groups["tp"] == Placement(16, 2, 8)
    assert groups["dim"] == Placement(4, 1, 4)
    assert groups["head"] == Placement(4, 2, 2)
    assert groups["ep"] == Placement(8, 1, 8)
    assert groups["edp"] == Placement(2, 2, 1)
    other = placements(16, 1, 1, 1, 8, 4, 4, 8, "head-innermost")
    assert (other["head"], other["dim"]) == (groups["dim"], groups["head"])
    assert {axis: other[axis] for axis in ("tp", "ep", "edp")} == {axis: groups[axis] for axis in ("tp", "ep", "edp")}


def test_placement_of_stock_layouts() -> None:
    groups = placements(8, 1, 48, 2, 1, 8, 1, 8)
    assert groups["tp"] == Placement(8, 1, 8)
    assert groups["dp"] == Placement(48, 48, 1)  # one rank of each node
    assert groups["pp"] == Placement(2, 2, 1)
    assert placements(1, 1, 48, 1, 1, 1, 1, 8)["dp"] == Placement(48, 6, 8)
    # Of four stages in two nodes, the second hands over to another node; a replica of three ranks straddles them.
    assert placements(4, 1, 1, 4, 1, 4, 1, 8)["pp"] == Placement(2, 2, 1)
    assert placements(4, 1, 1, 2, 1, 4, 1, 8)["pp"] == Placement(2, 1, 2)
    assert placements(4, 1, 1, 4, 1, 4, 1, 8)["ends"] == Placement(2, 2, 1)
    assert placements(2, 1, 3, 4, 1, 2, 1, 8)["dp"] == Placement(3, 2, 1)
    assert placements(8, 1, 1, 1, 1, 8, 1, 8)["pp"] == Placement(1, 1, 1)
    # TP=6 on nodes of 8 straddles nodes; the worst group counts.
    assert placements(6, 1, 4, 1, 1, 6, 1, 8)["tp"].domains == 2
