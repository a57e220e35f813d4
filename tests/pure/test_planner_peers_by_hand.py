"""What stock does by rarer flags, written out: weights shared by data-parallel ranks, context parallelism by heads.

D = 8, 4 query and 2 key/value heads of 4 channels, an MLP of 24: a layer's linears have 768 parameters,
8 · (16+16) + 16 · 8 + 2 · 8 · 24.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from hp_plugin.planner.counts.exchange import exchanged
from hp_plugin.planner.counts.feasibility import shape_refusals
from hp_plugin.planner.counts.gradients import chunk_sync
from hp_plugin.planner.counts.layer import layer_passes
from hp_plugin.planner.counts.memory import memory_needed
from hp_plugin.planner.counts.program import Collective, FusedAttention
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.machine.placement import Placement, placements
from hp_plugin.planner.search.candidates import Search, candidate_layouts
from hp_plugin.planner.search.launch_flags import megatron_flags
from hp_plugin.planner.search.relief import reliefs
from hp_plugin.planner.seconds.step import predict
from tests.programs import listed

MODEL = ModelShape("tiny", 2, 8, 4, 2, 4, 24)


def share(layout: str, mode: str = "train", batch: int = 8, **changes: object) -> Share:
    return Share(replace(MODEL, **changes), Layout.parse(f"{layout},mbs=2"), Workload(mode, 8, batch))


def test_gathers_and_reductions_of_shared_weights_run_beside_the_layer() -> None:
    plain, mine = layer_passes(share("tp=2,dp=2"), False), layer_passes(share("tp=2,dp=2,gtp=2"), False)
    gather, reduce = ("all_gather", "gtp", 768 / 2 * 2), ("reduce_scatter", "gtp", 768 / 2 * 2)
    # The whole gradient made and read, in 16 bit; a half of it added to fp32, which is read and written.
    added = ("add up weight gradients", 2 * 2 * 384 + (2 * 4 + 2) * 192)
    assert listed(mine.forward) == [gather, *listed(plain.forward)]
    assert listed(mine.backward) == [gather, *listed(plain.backward), reduce, added]
    assert [block.behind for block in mine.forward if block.collectives and block.collectives[0].axis == "gtp"] == [
        True
    ]
    again = layer_passes(share("tp=2,dp=2,gtp=2,recompute=full"), False).backward
    assert [each for each in listed(again) if each == gather] == [gather] * 2


def test_memory_of_shared_weights() -> None:
    """Of 2 · 768 parameters a quarter; two layers whole; the optimizer is spread over all replicas as before."""
    plain, mine = (memory_needed(share(f"dp=4,gtp={gtp}")) for gtp in (1, 4))
    assert plain.weights - mine.weights == 2 * (2 * 768 * 3 / 4 - 2 * 768)
    assert plain.gradients - mine.gradients == 4 * 2 * 768 * 3 / 4
    assert plain.optimizer == mine.optimizer and plain.activations == mine.activations


def test_replicas_reduce_what_a_rank_holds() -> None:
    """Norms, 2 · 2 · 16 and 16 at the end, over all four; a half of the linears over the two that hold the same."""
    mine = share("dp=4,gtp=2")
    sync = chunk_sync(mine, mine.parameters[0], 0, 0)
    norms = 2 * 2 * 16 + 16
    assert [(each.axis, each.bytes) for each in sync.gradients] == [("dp", 4.0 * norms), ("gdp", 4.0 * 768)]
    assert [(each.axis, each.bytes) for each in sync.weights] == [("dp", 2.0 * norms), ("gdp", 2.0 * 768)]


@pytest.mark.parametrize(("heads", "around"), [(2, 2), (4, 1), (1, 4)])
def test_context_parallelism_by_heads(heads: int, around: int) -> None:
    """Of 4 ranks with 2 of 8 positions each, `heads` trade: a rank then has 4/heads heads of 2 · heads positions."""
    model = {"h": 8, "g": 4}
    mine = share(f"cp=4,cp_heads={heads}", **model)
    found = exchanged(mine)
    (attention,) = [each for block in found.core for each in block.kernels if isinstance(each, FusedAttention)]
    assert (attention.heads, attention.queries, attention.keys) == (2 * 8 // heads, 2 * heads, 8)
    assert attention.pairs * attention.heads == 2 * 8 * 2 * 8 / 2, "the same work on every rank"
    sends = [each for block in found.core for each in block.collectives]
    # k and v of all 4 heads, 2 samples, 2 positions, 4 channels, 2 bytes, whichever way they lie.
    ring = Collective("pass k, v on", "send_recv", "cp" if heads == 1 else "cp_ring", 2.0 * 4 * 2 * 2 * 4 * 2)
    assert sends == [ring] * (around - 1)
    traded = [each for block in (*found.before, *found.after) for each in block.collectives]
    qkv, context = (8 + 2 * 4) * 4 * 2 * 2 * 2, 8 * 4 * 2 * 2 * 2
    expected = [("all_to_all", "cp_heads", qkv), ("all_to_all", "cp_heads", context)] if heads > 1 else []
    assert [(each.kind, each.axis, each.bytes) for each in traded] == expected


def test_where_their_groups_lie() -> None:
    """8 ranks a node: shared weights stay in it behind TP, their replicas do not; a ring's neighbours are 4 apart."""
    groups = placements(2, 1, 8, 1, 1, 2, 1, 8, gtp=4)
    assert (groups["gtp"], groups["gdp"]) == (Placement(4, 1, 4), Placement(2, 2, 1))
    groups = placements(2, 8, 1, 1, 1, 2, 1, 8, cp_heads=4)
    assert (groups["cp_heads"], groups["cp_ring"]) == (Placement(4, 1, 4), Placement(2, 2, 1))
    assert "gtp" not in groups and "cp_ring" not in placements(2, 8, 1, 1, 1, 2, 1, 8)


@pytest.mark.parametrize(
    ("layout", "mode", "kind"),
    [
        ("grid=1x2,exchange=batch,dp=2,gtp=2", "train", "shared weights"),
        ("dp=2,gtp=2", "forward", "shared weights"),
        ("dp=2,gtp=2,zero=full", "train", "shared weights"),
        ("cp=4,cp_heads=4", "train", "heads of context ranks"),
        ("tp=4,cp=2,cp_heads=2", "train", "heads of context ranks"),
    ],
)
def test_what_is_not_planned(layout: str, mode: str, kind: str) -> None:
    assert kind in [refusal.kind for refusal in shape_refusals(share(layout, mode))]


def test_a_search_has_them_when_asked_and_says_their_flags() -> None:
    model = ModelShape("small", 4, 512, 8, 4, 64, 2048, 1000)
    workload = Workload("train", 8192, 16)
    asked = set(candidate_layouts(model, 8, workload, Search((), peers=True), 8))
    assert {layout.gtp for layout in asked} == {1, 2, 4, 8} and {layout.cp_heads for layout in asked} == {1, 2, 4}
    plain = set(candidate_layouts(model, 8, workload, Search(()), 8))
    assert plain == {layout for layout in asked if layout.gtp == layout.cp_heads == 1}
    for text, said in (
        ("tp=2,dp=4,gtp=4", "--tensor-parallel-num-weight-shards 8"),
        ("cp=4,cp_heads=2", "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2"),
        ("cp=4,cp_heads=4", "--cp-comm-type a2a"),
    ):
        found = predict(model, Layout.parse(text, 8), workload, load_hardware("h100-ib"))
        assert said in " ".join(megatron_flags(found)) and found.step > 0
    with pytest.raises(ValueError, match="gtp=3 does not divide dp=4"):
        Layout.parse("dp=4,gtp=3")


def test_half_of_the_replicas_share_weights_as_far_as_they_can() -> None:
    """Changes that take half of the data-parallel ranks for something else keep a layout that exists."""
    hardware = load_hardware("h100-ib")
    model = ModelShape("small", 4, 512, 8, 4, 64, 2048, 1000)
    found = predict(model, Layout.parse("dp=4,gtp=4,mbs=2"), Workload("train", 2048, 16), hardware)
    changes = [relief.flags for relief in reliefs(found, hardware, 9)]
    assert "--pipeline-model-parallel-size 2" in changes and "--tensor-model-parallel-size 2" in changes
