"""Pipeline schedules against tables drawn by hand, and their simulation against closed forms."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hp_plugin.planner.counts.schedule import peak_in_flight, pipeline_order
from hp_plugin.planner.seconds.timeline import PassTimes, Pipeline, simulate


def drawn(rank: int, pp: int, vpp: int, micro_batches: int, training: bool = True) -> str:
    return " ".join(map(str, pipeline_order(rank, pp, vpp, micro_batches, training)))


def test_one_forward_one_backward_by_hand() -> None:
    assert drawn(0, 3, 1, 4) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert drawn(1, 3, 1, 4) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert drawn(2, 3, 1, 4) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert drawn(0, 3, 1, 2) == "F0 F1 B0 B1"  # fewer micro-batches than stages
    assert drawn(1, 2, 1, 3, training=False) == "F0 F1 F2"


def test_interleaved_by_hand() -> None:
    """Two ranks, two chunks (`.1` is the second), four micro-batches: Narayanan et al. (arXiv 2104.04473), figure 4."""
    assert drawn(0, 2, 2, 4) == "F0 F1 F0.1 F1.1 F2 B0.1 F3 B1.1 F2.1 B0 F3.1 B1 B2.1 B3.1 B2 B3"
    assert drawn(1, 2, 2, 4) == "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 F3 B1 F2.1 B2.1 F3.1 B3.1 B2 B3"


def test_interleaving_needs_a_multiple_of_the_stages() -> None:
    with pytest.raises(ValueError, match="5 micro-batches are no multiple of pp=4"):
        pipeline_order(0, 4, 2, 5, True)


@pytest.mark.parametrize(("pp", "vpp", "count"), [(1, 1, 3), (2, 1, 5), (4, 1, 9), (2, 3, 4), (4, 2, 8)])
def test_every_pass_runs_once_and_backward_after_forward(pp: int, vpp: int, count: int) -> None:
    for rank in range(pp):
        order = pipeline_order(rank, pp, vpp, count, True)
        assert len(order) == len(set(order)) == 2 * vpp * count
        seen = set()
        for task in order:
            if task.backward:
                assert (task.chunk, task.micro_batch) in seen
            seen.add((task.chunk, task.micro_batch))


def test_activations_in_flight() -> None:
    # 1F1B: stage p of 4 holds 4 - p micro-batches.
    assert [peak_in_flight(pipeline_order(rank, 4, 1, 9, True), [1.0]) for rank in range(4)] == [4, 3, 2, 1]
    assert peak_in_flight(pipeline_order(0, 4, 1, 2, True), [1.0]) == 2
    # Interleaved, rank 0 of 2 with 2 chunks: 2·(2-1) + (2-1)·2 warm-up passes and one more.
    assert peak_in_flight(pipeline_order(0, 2, 2, 4, True), [1.0, 1.0]) == 5


def uniform(pp: int, vpp: int, count: int, f: float, b: float, **rest: object) -> Pipeline:
    ahead, back = [PassTimes(f, f)] * (pp * vpp), [PassTimes(b, b)] * (pp * vpp)
    return Pipeline(pp, vpp, count, ahead, back, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(("pp", "count"), [(1, 3), (2, 2), (2, 8), (4, 8), (8, 64)])
def test_bubble_of_1f1b(pp: int, count: int) -> None:
    line = simulate(uniform(pp, 1, count, 1.0, 2.0))
    assert line.seconds == pytest.approx((count + pp - 1) * 3.0)
    assert line.compute == pytest.approx([count * 3.0] * pp)


@pytest.mark.parametrize(("pp", "vpp", "count"), [(2, 2, 4), (4, 2, 8), (4, 3, 16)])
def test_interleaving_divides_the_bubble(pp: int, vpp: int, count: int) -> None:
    line = simulate(uniform(pp, vpp, count, 1.0 / vpp, 2.0 / vpp, blocking=False))
    assert line.seconds == pytest.approx(count * 3.0 + (pp - 1) * 3.0 / vpp)


def test_transfers_by_hand() -> None:
    """Two stages, one micro-batch: F, send 0.5, F, B, send 0.5, B; blocking changes nothing on an idle pipeline."""
    for blocking in (True, False):
        line = simulate(uniform(2, 1, 1, 1.0, 2.0, transfer=0.5, blocking=blocking))
        assert line.seconds == pytest.approx(1 + 0.5 + 1 + 2 + 0.5 + 2)
    assert simulate(uniform(2, 1, 1, 1.0, 2.0, transfer=0.5)).sending == pytest.approx([0.5, 0.5])
    # Forward only, three micro-batches: the first stage computes and sends three times, then the second finishes.
    only = Pipeline(2, 1, 3, [PassTimes(1.0, 1.0)] * 2, [], 0.5, blocking=True)
    assert simulate(only).seconds == pytest.approx(3 * 1.5 + 1.0)


def test_the_slowest_stage_sets_the_pace() -> None:
    slow = [PassTimes(1.0, 1.0), PassTimes(1.5, 1.5)]
    back = [PassTimes(2.0, 2.0), PassTimes(3.0, 3.0)]
    line = simulate(Pipeline(2, 1, 10, slow, back))
    assert line.seconds == pytest.approx(1.0 + 10 * 4.5 + 2.0)
    assert line.compute == pytest.approx([30.0, 45.0])


def test_late_weights_hold_up_the_first_pass_only() -> None:
    gated = simulate(uniform(2, 1, 4, 1.0, 2.0, gates={(0, 0): (3.0, 0.25)}))
    # All weights after 3 s, a quarter of the pass still to do then: it ends at 3.25 instead of 1.
    assert gated.gated == pytest.approx([2.25, 0.0])
    assert gated.seconds == pytest.approx((4 + 1) * 3.0 + 2.25)
    early = simulate(uniform(2, 1, 4, 1.0, 2.0, gates={(0, 0): (0.5, 0.25)}))
    assert early.seconds == pytest.approx(15.0)


def test_events_tile_a_ranks_time_without_overlap() -> None:
    line = simulate(uniform(4, 2, 8, 0.5, 1.0, transfer=0.1, blocking=False))
    for rank in range(4):
        events = [event for event in line.events if event.rank == rank and event.lane == "passes"]
        assert len(events) == 32
        assert all(first.end <= second.start + 1e-12 for first, second in pairwise(events))
        assert sum(event.end - event.start for event in events) == pytest.approx(line.passes[rank])
    assert simulate(uniform(2, 1, 2, 1.0, 1.0), record=False).events == []
