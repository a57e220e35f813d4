"""Whole predictions: nothing is lost, nothing is counted twice, and more of a good thing does not hurt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hp_plugin.planner.counts.program import Block, Collective, Gemm
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.machine.placement import Placement
from hp_plugin.planner.reports.chrome_trace import trace_events, write_trace
from hp_plugin.planner.seconds.decode import decode_period
from hp_plugin.planner.seconds.prediction import Prediction
from hp_plugin.planner.seconds.pricing import Pricer
from hp_plugin.planner.seconds.step import predict

H100 = load_hardware("h100-ib")
MODEL = ModelShape("m", 16, 2048, 16, 8, 128, 8192, 32000, gated=True)
MOE = replace(MODEL, experts=8, top_k=2)


def run(text: str, model: ModelShape = MODEL, mode: str = "train", batch: int = 64, full: bool = False) -> Prediction:
    return predict(model, Layout.parse(text), Workload(mode, 2048, batch), H100, full)


LAYOUTS = [
    "tp=1,dp=8,mbs=2", "tp=8,mbs=4", "tp=8,mbs=4,sp,tp_overlap", "tp=4,pp=4,mbs=2,sp", "tp=2,pp=4,vpp=4,mbs=1,sp",
    "tp=2,pp=2,dp=4,mbs=2,recompute=full", "tp=2,cp=2,dp=2,mbs=2", "tp=16,mbs=4", "grid=4x4,exchange=batch,mbs=4",
    "grid=2x4,exchange=sequence,mbs=1", "grid=4x2,exchange=scores,mbs=2", "grid=8x2,exchange=local,mbs=2",
    "dp=8,mbs=2,zero=full,fused=off", "dp=4,mbs=4,zero=replicated", "pp=3,mbs=2",
]  # fmt: skip


@pytest.mark.parametrize("text", LAYOUTS)
def test_a_step_is_its_kernels_and_its_waiting(text: str) -> None:
    found = run(text)
    assert found.compute + sum(found.waiting.values()) == pytest.approx(found.step)
    # The grad norm is summed over the world; the other groups only where they have more than one rank.
    layout = found.layout
    several = {"tp": layout.tp > 1, "dp": layout.dp > 1, "cp": layout.cp > 1, "pipeline": layout.pp > 1}
    several["dim"] = layout.grid is not None and "local" not in text
    assert {*found.waiting, *found.hidden} == {"world", *(axis for axis, there in several.items() if there)}
    assert sum(found.kernels.values()) == pytest.approx(found.compute, rel=0.02)  # without what DP traffic takes
    assert found.tokens_per_s == pytest.approx(64 * 2048 / found.step)
    assert found.tpot == pytest.approx((found.step - found.compute) / 2048)


@pytest.mark.parametrize("text", ["tp=2,pp=4,mbs=1,sp", "tp=2,pp=2,vpp=4,mbs=1", "tp=2,pp=4,dp=2,mbs=1", "pp=3,mbs=1"])
@pytest.mark.parametrize("mode", ["train", "forward"])
def test_the_repeated_steady_state_is_exact(text: str, mode: str) -> None:
    short, full = run(text, mode=mode, batch=96), run(text, mode=mode, batch=96, full=True)
    assert short.step == pytest.approx(full.step, rel=1e-9)
    assert short.compute == pytest.approx(full.compute, rel=1e-9)


@pytest.mark.parametrize("text", ["tp=2,pp=4,vpp=4,mbs=1,sp", "tp=4,pp=4,mbs=2,sp", "pp=3,mbs=2", "pp=2,mbs=4"])
def test_waiting_for_other_stages_is_the_time_of_a_rank_in_which_nothing_else_is_drawn(text: str) -> None:
    """Without replicas a rank's time is passes, optimizer and grad norm; the rest is sending, receiving and idling."""
    found = run(text, full=True)
    busy = sum(event.end - event.start for event in found.events if event.lane in ("passes", "optimizer"))
    assert found.waiting["pipeline"] == pytest.approx(found.step - busy / found.layout.pp)
    assert found.waiting["pipeline"] > 0.001 * found.step


@pytest.mark.parametrize("text", ["tp=1,dp=8,mbs=2", "tp=8,mbs=4,sp", "grid=4x4,exchange=batch,mbs=4"])
def test_a_single_stage_waits_for_no_other(text: str) -> None:
    assert run(text).waiting.get("pipeline", 0.0) == pytest.approx(0.0, abs=1e-9)


def test_events_fill_the_simulated_step() -> None:
    found = run("tp=2,pp=4,dp=2,mbs=2", full=True)
    assert max(event.end for event in found.events) == pytest.approx(found.step)
    for rank in range(4):
        passes = [event for event in found.events if event.rank == rank and event.lane == "passes"]
        assert len(passes) == 2 * found.micro_batches
    buckets = [event for event in found.events if event.lane == "gradients"]
    last = max(event.end for event in found.events if event.lane == "passes")
    assert buckets and min(event.start for event in buckets) < last, "reductions start beside the last passes"


def test_the_trace_is_what_perfetto_reads(tmp_path: Path) -> None:
    found = run("tp=2,pp=4,dp=2,mbs=4", full=True)
    path = tmp_path / "trace.json"
    write_trace(found, path)
    document = json.loads(path.read_text())
    complete = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert len(complete) == len(found.events) == len(trace_events(found)) - 4 * 5
    assert {event["pid"] for event in complete} == {0, 1, 2, 3}
    assert all(event["dur"] >= 0 for event in complete)
    assert max(event["ts"] + event["dur"] for event in complete) == pytest.approx(found.step * 1e6)
    with pytest.raises(ValueError, match="cannot write"):
        write_trace(found, tmp_path / "no" / "trace.json")


def test_slower_machines_are_slower() -> None:
    base = run("tp=8,pp=2,mbs=2").step
    for name, worse in (
        ("hbm_bytes_per_s", 0.5), ("gemm_efficiency", 0.5), ("attention_scale", 0.5), ("gemm_scale", 0.5),
    ):  # fmt: skip
        hardware = H100.with_parameter(name, H100[name] * worse, "user", "test")
        slower = predict(MODEL, Layout.parse("tp=8,pp=2,mbs=2"), Workload("train", 2048, 64), hardware).step
        assert slower > base, name
    switch = predict(MODEL, Layout.parse("tp=16,mbs=4"), Workload("train", 2048, 64), load_hardware("h100-nvlink"))
    assert switch.step < run("tp=16,mbs=4").step


def test_micro_batches_shrink_the_bubble() -> None:
    bubbles = [run("tp=4,pp=4,mbs=1", batch=batch).bubble for batch in (4, 8, 32, 128)]
    assert bubbles == sorted(bubbles, reverse=True)
    assert bubbles[0] > 0.4
    assert run("tp=4,pp=4,vpp=4,mbs=1", batch=8).bubble < run("tp=4,pp=4,mbs=1", batch=8).bubble


def test_training_costs_about_three_forward_passes() -> None:
    assert 2.8 < run("dp=8,mbs=4").step / run("dp=8,mbs=4", mode="forward").step < 3.4


def test_rates_stay_below_the_peak() -> None:
    for text in LAYOUTS:
        assert 0 < run(text).operations_per_s < H100["peak_flops"]


def test_overlap_hides_communication_but_costs_multiprocessors() -> None:
    plain, overlapped = run("tp=8,mbs=4,sp"), run("tp=8,mbs=4,sp,tp_overlap")
    assert overlapped.waiting["tp"] < plain.waiting["tp"]
    assert overlapped.compute > plain.compute
    assert overlapped.step < plain.step


def test_one_block_by_hand() -> None:
    """A product beside a reduction of half its length, then of twice its length."""
    groups = {"tp": Placement(8, 1, 8)}
    pricer = Pricer(H100, groups, 2)
    product = Gemm("g", 8192, 8192, 8192)
    alone = pricer.kernel(product)
    share = 16 / 132
    for factor in (0.5, 2.0):
        curve = H100.collectives
        size = next(
            s for s in range(2**20, 2**34, 2**20) if curve.seconds("all_reduce", s, groups["tp"]) >= factor * alone
        )
        reduce = Collective("r", "all_reduce", "tp", float(size))
        wait = pricer.collective(reduce)
        (span,) = pricer.spans((Block((product,), (reduce,), overlap=True),))
        if factor < 1:
            assert span.compute == pytest.approx(alone + share * wait)
            assert span.exposed == 0.0
        else:
            assert span.compute == pytest.approx(alone / (1 - share))
            assert span.seconds == pytest.approx(wait)
        (pieces,) = pricer.spans((Block((product,), (reduce,), overlap=True, pieces=8),))
        assert pieces.exposed == pytest.approx(span.exposed + min(wait, span.compute) / 8)


def test_exchanges_rank_as_their_traffic() -> None:
    """Longer than a few hundred tokens: `local` moves nothing, `batch` least of the exact ones, `scores` most."""
    steps = {name: run(f"grid=4x4,exchange={name},mbs=4").step for name in ("local", "batch", "sequence", "scores")}
    assert steps["local"] < steps["batch"] < steps["sequence"] < steps["scores"]


def test_the_grid_beats_stock_beyond_the_key_value_heads() -> None:
    gqa = replace(MODEL, g=2)
    assert run("grid=2x4,exchange=batch,mbs=4", gqa).step < run("tp=8,mbs=4", gqa).step


def test_experts_are_predicted_for_both_backends() -> None:
    megatron = run("tp=4,dp=2,ep=8,mbs=2,sp", MOE)
    deepspeed = run("tp=4,dp=2,ep=8,mbs=2,moe=deepspeed", MOE)
    for found in (megatron, deepspeed):
        assert found.waiting["ep"] > 0
        assert found.compute + sum(found.waiting.values()) == pytest.approx(found.step)
    grid = run("grid=2x2,exchange=batch,dp=2,ep=8,mbs=2,sp", MOE)
    assert grid.waiting["ep"] == pytest.approx(megatron.waiting["ep"])


def test_decode_waits_for_every_token_or_streams() -> None:
    flushed = run("tp=4,pp=2,mbs=16", mode="decode", batch=64)
    streamed = predict(MODEL, Layout.parse("tp=4,pp=2,mbs=16"), Workload("decode", 2048, 64, continuous=True), H100)
    assert streamed.step < flushed.step
    assert flushed.tokens_per_s == pytest.approx(64 / flushed.step)
    assert decode_period([1.0, 1.0], 0.5, 1) == 3.0
    assert decode_period([1.0, 2.0], 0.5, 4) == 10.0
    assert decode_period([1.0], 0.5, 4) == 4.0


def test_longer_contexts_take_longer_to_decode() -> None:
    steps = [
        predict(MODEL, Layout.parse("tp=8,mbs=64"), Workload("decode", context, 64), H100).step
        for context in (128, 1024, 8192)
    ]
    assert steps == sorted(steps)


def test_forward_of_the_source_model_cannot_reach_its_training_rate() -> None:
    """DESIGN section 7: 1.2 M tokens/s of training would need 23 PFLOP/s of a 15.8 PFLOP/s peak."""
    paper = load_model("paper-dense")
    needed = 3 * paper.matmul_operations(1, 0) * 1.2e6
    assert needed == pytest.approx(23.2e15, rel=0.01)
    assert needed > 16 * H100["peak_flops"]
