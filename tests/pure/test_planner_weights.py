"""Layouts whose weights move: what hides, what memory they need, and which order of ranks they want."""

from __future__ import annotations

import pytest

from hp_plugin.planner.counts.feasibility import shape_refusals
from hp_plugin.planner.counts.gathering import to_share, to_stock
from hp_plugin.planner.counts.memory import memory_needed
from hp_plugin.planner.counts.program import Block, Collective, Gemm, collectives
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.machine.placement import placements
from hp_plugin.planner.search.candidates import Search, candidate_layouts
from hp_plugin.planner.seconds.pricing import Pricer
from hp_plugin.planner.seconds.step import predict

H100 = load_hardware("h100-ib")
DENSE = load_model("paper-dense")
TRAIN = Workload("train", 2048, 1024, grad_itemsize=2)


def share(layout: str, model: ModelShape = DENSE, workload: Workload = TRAIN) -> Share:
    return Share.on(H100, model, Layout.parse(layout), workload)


@pytest.mark.parametrize("megabytes", [1, 100, 10_000])
def test_what_runs_behind_a_program_is_priced_as_beside_one_block_of_its_kernels(megabytes: int) -> None:
    pricer = Pricer(H100, placements(16, 1, 1, 1, 1, 4, 4, 8), 2)
    one, other = Gemm("one", 4096, 4096, 4096), Gemm("other", 8192, 4096, 4096)
    gather = Collective("gather", "all_gather", "dim", megabytes * 1e6)
    behind = pricer.cost((Block((one,)), Block((), (gather,), behind=True), Block((other,))))
    beside = pricer.cost((Block((one, other), (gather,), overlap=True),))
    assert behind.seconds == pytest.approx(beside.seconds) and behind.hidden_by == pytest.approx(beside.hidden_by)


def test_kernels_hide_only_once() -> None:
    pricer = Pricer(H100, placements(16, 1, 1, 1, 1, 4, 4, 8), 2)
    product, gather = Gemm("one", 4096, 4096, 4096), Collective("gather", "all_gather", "dim", 1e9)
    alone = pricer.collective(gather)
    once, twice = (pricer.cost((Block((product,)), *times * (Block((), (gather,), behind=True),))) for times in (1, 2))
    assert twice.exposed == pytest.approx(once.exposed + alone)
    taken = pricer.cost((Block((product,), (gather,), overlap=True), Block((), (gather,), behind=True)))
    assert taken.exposed_by["dim"] >= alone, "what has a collective beside it has no room for another"


def test_memory_is_that_of_a_share_and_two_layers_at_one_mth() -> None:
    stock, grid = (memory_needed(share(text)) for text in ("tp=16,mbs=4", "grid=4x4,exchange=weights,mbs=4"))
    linears = 4 * 8192 * 16 * 512 + 2 * 8192 * 32768
    assert grid.weights - stock.weights == pytest.approx(2 * 2 * linears / 4)
    assert grid.optimizer == stock.optimizer and grid.gradients == stock.gradients
    # Norms' inputs and residuals of a fourth of the tokens; the rest is as large as in stock.
    assert grid.activations < stock.activations


def test_recomputing_reaches_what_layers_work_on() -> None:
    mine = share("grid=4x4,exchange=weights,mbs=4")
    assert mine.within.tokens == 2048 and mine.within.P == 4
    assert mine.recomputing("full").within.layout.recompute == "full"


def test_with_many_tokens_the_head_axis_wants_to_be_inside_a_node() -> None:
    near, far = (
        predict(DENSE, Layout.parse(f"grid=4x4,exchange=weights,mbs=256,sp{order}"), TRAIN, H100)
        for order in (",order=head-innermost", "")
    )
    assert near.tokens_per_s > far.tokens_per_s and near.waiting["head"] < far.waiting["head"]
    search = Search(("weights",), tensor_parallel=(16,), max_micro_batch=4)
    orders = {layout.order for layout in candidate_layouts(DENSE, 16, TRAIN, search, 8) if layout.m == layout.n}
    assert orders == {"dim-innermost", "head-innermost"}


def test_tokens_are_spread_where_samples_are_too_few() -> None:
    few = share("grid=4x4,exchange=weights,mbs=2").within
    assert (few.b, few.s) == (2, 512)
    many = share("grid=4x4,exchange=weights,mbs=8").within
    assert (many.b, many.s) == (2, 2048)


@pytest.mark.parametrize(
    ("layout", "mode", "said"),
    [
        ("grid=2x2,exchange=weights,mbs=1", "decode", "needs a batch size divisible by n behind a key/value cache"),
        ("grid=2x2,exchange=weights,mbs=2,cp=2", "forward", "context parallelism"),
        ("grid=2x2,exchange=weights,mbs=2,dp=2,zero=full", "train", "zero=full"),
    ],
)
def test_what_cannot_be_is_refused(layout: str, mode: str, said: str) -> None:
    narrow = ModelShape("narrow", 4, 256, 8, 4, 64, 512)
    refusals = shape_refusals(share(layout, narrow, Workload(mode, 64, 32)))
    assert refusals and said in " ".join(refusal.text for refusal in refusals)


@pytest.mark.parametrize(("order", "axis", "sent"), [("dim-innermost", "dim", 32), ("head-innermost", "tp", 48)])
def test_tokens_go_further_to_their_ranks_where_neighbours_split_heads(order: str, axis: str, sent: int) -> None:
    """2 × 2 ranks have a fourth of 8 positions of 2 samples, 64 bytes; of it a half leaves, or three fourths.

    Head-innermost, ranks 1 and 2 have positions of the other head group's part alone, and 0 and 3 half of their own.
    """
    model = ModelShape("tiny", 2, 8, 4, 2, 4, 24)
    mine = Share(model, Layout.parse(f"grid=2x2,exchange=weights,order={order},mbs=2,sp"), Workload("train", 8, 8))
    for way in (to_share(mine), to_stock(mine)):
        for program in (way.forward, way.backward):
            (trade,) = collectives(program)
            assert (trade.kind, trade.axis, trade.received(2 if axis == "dim" else 4)) == ("all_to_all", axis, sent)
