"""The search: everything feasible is there, everything else has its reason, and the flags say what was predicted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hp_plugin.exchange.rules import RULES
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.reports.sweep import sweep_curves
from hp_plugin.planner.reports.text import explanation, hardware_report, plan_report
from hp_plugin.planner.search.candidates import Search, candidate_layouts
from hp_plugin.planner.search.launch_flags import deepspeed_config, megatron_flags
from hp_plugin.planner.search.plan import fitting, make_plan
from hp_plugin.planner.seconds.step import predict

H100 = load_hardware("h100-ib")
MODEL = ModelShape("m", 4, 1024, 8, 2, 128, 4096, 1024)
TRAIN = Workload("train", 512, 16)
PLAN = make_plan(MODEL, 8, TRAIN, H100)


def test_candidates_are_unique_and_fill_the_world() -> None:
    layouts = list(candidate_layouts(MODEL, 8, TRAIN, Search()))
    assert len(layouts) == len(set(layouts)) == len(PLAN.found) + len(PLAN.refused)
    assert all(layout.world == 8 for layout in layouts)
    texts = set(map(str, layouts))
    for wanted in ("tp=8,mbs=2", "tp=2,pp=4,mbs=1,sp", "grid=2x4,exchange=batch,mbs=4", "tp=2,pp=2,vpp=2,dp=2,mbs=2"):
        assert wanted in texts


def test_fully_sharded_and_gathered_weights_are_tried() -> None:
    texts = set(map(str, candidate_layouts(MODEL, 8, TRAIN, Search())))
    assert {"tp=2,dp=4,mbs=2,sp,zero=full", "grid=2x4,exchange=weights,mbs=4,sp"} <= texts
    assert not any("zero=full" in text and ("grid" in text or "pp=" in text or "cp=" in text) for text in texts)


def test_both_orders_are_tried_where_both_axes_carry_traffic_over_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def orders(gpus: int, tp: int, domain: int | None = 8) -> dict[str, set[str]]:
        search, found = Search(("batch",), tensor_parallel=(tp,)), {}
        for layout in candidate_layouts(MODEL, gpus, TRAIN, search, domain):
            if layout.grid is not None:
                found.setdefault(f"{layout.m}x{layout.n}", set()).add(layout.order)
        return found

    dim, both = {"dim-innermost"}, {"dim-innermost", "head-innermost"}
    assert set(map(frozenset, orders(16, 16).values())) == {frozenset(dim)}, "nothing is sent over the head axis"
    monkeypatch.setattr(RULES["batch"], "head_axis", True, raising=False)
    assert orders(16, 16) == {"8x2": both, "4x4": both, "2x8": both, "1x16": dim}
    assert orders(16, 8) == {"4x2": dim, "2x4": dim, "1x8": dim}, "a TP group of one node has no far ranks"
    assert orders(12, 6)["3x2"] == both, "every other TP group of 6 lies on two nodes of 8"
    assert orders(16, 16, None)["4x4"] == dim


def test_the_axis_whose_ranks_are_neighbours_is_priced_and_printed() -> None:
    model = replace(MODEL, h=16, g=4)
    near, far = (
        predict(model, Layout.parse(f"grid=4x4,exchange=batch,mbs=16{order}"), TRAIN, H100)
        for order in ("", ",order=head-innermost")
    )
    assert near.tokens_per_s > far.tokens_per_s, "the exchange crosses nodes"
    assert near.waiting["tp"] == pytest.approx(far.waiting["tp"]) and near.waiting["dim"] < far.waiting["dim"]
    assert "--head-dim-order head-innermost" in megatron_flags(far)
    assert not any("order" in flag for flag in megatron_flags(near))
    assert deepspeed_config(far)["head_dim_parallel"]["order"] == "head-innermost"
    assert "order" not in deepspeed_config(near)["head_dim_parallel"]


def test_found_is_sorted_and_agrees_with_single_predictions() -> None:
    rates = [found.tokens_per_s for found in PLAN.found]
    assert rates == sorted(rates, reverse=True)
    for found in PLAN.found[:: len(PLAN.found) // 7]:
        assert predict(MODEL, found.layout, TRAIN, H100).step == pytest.approx(found.step)


def test_refused_layouts_say_why() -> None:
    reasons = {str(one.layout): one.text for one in PLAN.refused}
    assert "needs a micro-batch size divisible by n: 1 % 4" in reasons["grid=2x4,exchange=batch,mbs=1"]
    assert "m=4 must divide both" in reasons["grid=4x2,exchange=batch,mbs=2"]


def test_what_is_less_than_the_error_apart_is_called_a_tie() -> None:
    rates = [found.tokens_per_s for found in PLAN.found]
    first = next(k for k in range(len(rates)) if rates[k + 1] > rates[k] / 1.1)
    tied = len([rate for rate in rates[first:] if rate > rates[first] / 1.1])
    said = plan_report(replace(PLAN, found=PLAN.found[first:]), 3, "bf16")
    assert f"the first {tied} are less than 10% apart: a tie" in "\n".join(said)
    alone = replace(PLAN, found=PLAN.found[:1])
    assert "a tie" not in "\n".join(plan_report(alone, 3, "bf16"))


def test_best_of_each_kind_keeps_the_fastest() -> None:
    fastest: dict[tuple[object, ...], float] = {}
    for found in PLAN.found:
        layout = found.layout
        kind = (layout.tp, layout.grid, layout.pp, layout.cp)
        fastest[kind] = max(fastest.get(kind, 0.0), found.tokens_per_s)
    assert len(fastest) > 10
    best = PLAN.best_of_each_kind()
    assert len(best) == len(fastest)
    for found in best:
        layout = found.layout
        assert found.tokens_per_s == fastest.pop((layout.tp, layout.grid, layout.pp, layout.cp))
    rates = [found.tokens_per_s for found in best]
    assert rates == sorted(rates, reverse=True)


def test_local_is_never_called_exact() -> None:
    assert any(found.layout.grid and found.layout.grid.exchange == "local" for found in PLAN.found)
    assert all(found.layout.grid is None or found.layout.grid.exchange != "local" for found in PLAN.exact)


def test_recomputation_only_where_memory_demands_it() -> None:
    model = ModelShape("big", 32, 8192, 64, 8, 128, 28672, 32000, gated=True)
    workload = Workload("train", 4096, 64)
    layout = Layout.parse("tp=8,pp=2,dp=2,mbs=4,sp")
    assert fitting(model, Layout.parse("tp=8,pp=2,dp=2,mbs=1,sp"), workload, H100).layout.recompute == "none"
    enough = predict(model, layout, workload, H100).memory.total + H100["reserved_bytes"]
    assert fitting(model, layout, workload, H100, capacity=enough).layout.recompute == "none"
    squeezed = fitting(model, layout, workload, H100, capacity=enough - 1)
    assert squeezed.layout.recompute == "full"
    assert squeezed.memory.total < enough - H100["reserved_bytes"]
    with pytest.raises(ValueError, match="even with everything recomputed"):
        fitting(model, layout, workload, H100, capacity=20e9)


def test_a_model_that_no_layout_fits_is_told_what_it_lacks() -> None:
    with pytest.raises(ValueError, match=r"no layout of gpt3-175b \(174.6 B parameters\) fits on 8 GPUs: the smallest"):
        make_plan(load_model("gpt3-175b"), 8, Workload("train", 2048, 8), H100, Search(exchanges=("batch",)))
    with pytest.raises(ValueError, match="no layout of m on 7 GPUs has --micro-batches 3: it must divide what global"):
        make_plan(MODEL, 7, TRAIN, H100, Search(max_micro_batch=1, micro_batches=3))
    for gpus in (0, 10**12):
        with pytest.raises(ValueError, match="--gpus must be between 1 and 65536"):
            make_plan(MODEL, gpus, TRAIN, H100)
    with pytest.raises(ValueError, match=r"no layout of m divides over 7 GPUs: .* \(try --global-batch 14\)"):
        make_plan(MODEL, 7, TRAIN, H100, Search(tensor_parallel=(1,)))


def test_of_equals_the_models_own_function_and_stock_come_first() -> None:
    """In decode `local` moves nothing more than stock, so it ties."""
    plan = make_plan(MODEL, 2, Workload("decode", 512, 8), H100, Search(("batch", "local"), tensor_parallel=(2,)))
    tied = [found for found in plan.found if found.tokens_per_s == pytest.approx(plan.found[0].tokens_per_s, rel=1e-9)]
    kinds = [found.layout.grid.exchange if found.layout.grid else "stock" for found in tied]
    assert kinds == sorted(kinds, key=("stock", "batch", "local").index)
    assert len(tied) > 1


def test_only_asked_tensor_sizes_are_tried() -> None:
    plan = make_plan(MODEL, 8, TRAIN, H100, Search(("batch",), tensor_parallel=(2, 8)))
    assert {found.layout.tp for found in plan.found} | {one.layout.tp for one in plan.refused} == {2, 8}


def test_megatron_flags_say_the_layout() -> None:
    found = predict(MODEL, Layout.parse("grid=2x4,exchange=batch,mbs=4,sp,recompute=full"), TRAIN, H100)
    flags = " ".join(megatron_flags(found, "fp16"))
    for flag in (
        "--head-dim-parallel 2,4", "--head-dim-exchange batch", "--num-query-groups 2", "--kv-channels 128",
        "--micro-batch-size 4", "--global-batch-size 16", "--sequence-parallel", "--recompute-granularity full",
        "--fp16", "--use-distributed-optimizer", "--seq-length 512",
    ):  # fmt: skip
        assert flag in flags
    assert "--tensor-model-parallel-size" not in flags
    staged = predict(MODEL, Layout.parse("tp=2,pp=2,vpp=2,mbs=2"), TRAIN, H100)
    assert "--num-layers-per-virtual-pipeline-stage 1" in megatron_flags(staged)
    seven = ModelShape("seven", 7, 1024, 8, 2, 128, 4096)
    assert "--decoder-last-pipeline-num-layers 1" in megatron_flags(
        predict(seven, Layout.parse("tp=2,pp=4,mbs=2"), TRAIN, H100)
    )


def test_flags_of_experts_and_sharding_say_what_is_priced() -> None:
    model = ModelShape("moe", 2, 1024, 8, 8, 128, 4096, vocab=1000, experts=4)
    both = {
        moe: " ".join(megatron_flags(predict(model, Layout.parse(f"tp=2,sp,ep=2,mbs=2,moe={moe}"), TRAIN, H100)))
        for moe in ("megatron", "deepspeed")
    }
    assert "--moe-grouped-gemm" in both["megatron"] and "--moe-backend" not in both["megatron"]
    assert "--moe-backend deepspeed --moe-expert-capacity-factor 1" in both["deepspeed"]
    assert all("--vocab-size 1000" in flags for flags in both.values())
    full = " ".join(megatron_flags(predict(MODEL, Layout.parse("dp=4,mbs=2,zero=full"), TRAIN, H100)))
    assert "--use-torch-fsdp2" in full and "--use-distributed-optimizer" not in full
    half = replace(TRAIN, grad_itemsize=2)
    assert "--grad-reduce-in-bf16" in megatron_flags(predict(MODEL, Layout.parse("dp=4,mbs=2"), half, H100))
    forward = predict(MODEL, Layout.parse("dp=4,mbs=2"), replace(TRAIN, mode="forward"), H100)
    assert not any("batch-size" in flag for flag in megatron_flags(forward))


def test_deepspeed_config_says_the_layout() -> None:
    found = predict(MODEL, Layout.parse("grid=2x2,exchange=batch,dp=2,mbs=4"), TRAIN, H100)
    assert deepspeed_config(found) == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "head_dim_parallel": {"m": 2, "n": 2, "exchange": "batch"},
    }
    with pytest.raises(ValueError, match="not part of a DeepSpeed configuration"):
        deepspeed_config(predict(MODEL, Layout.parse("tp=2,pp=2,mbs=2"), TRAIN, H100))


def test_a_deepspeed_line_is_printed_for_experts_that_its_engine_trains_alone() -> None:
    model = ModelShape("moe", 2, 1024, 8, 8, 128, 4096, vocab=1000, experts=4)
    layouts = {moe: f"tp=2,sp,ep=2,mbs=2,moe={moe}" for moe in ("megatron", "deepspeed")}
    found = {moe: predict(model, Layout.parse(text), TRAIN, H100) for moe, text in layouts.items()}
    assert deepspeed_config(found["deepspeed"])["train_micro_batch_size_per_gpu"] == 2
    with pytest.raises(ValueError, match="trains DeepSpeed's experts alone"):
        deepspeed_config(found["megatron"])


def test_experts_that_all_tensor_parallel_ranks_hold_are_planned_where_their_gradients_are_summed() -> None:
    model = ModelShape("moe", 2, 1024, 8, 8, 128, 4096, vocab=1000, experts=4)
    with pytest.raises(ValueError, match=r"experts that all TP=2 ranks hold \(ep=1\) unsummed"):
        predict(model, Layout.parse("tp=2,sp,mbs=2"), TRAIN, H100)
    for text in ("grid=2x1,sp,mbs=2", "grid=1x2,sp,mbs=2", "tp=2,sp,mbs=2,moe=deepspeed", "tp=2,sp,ep=2,mbs=2"):
        assert predict(model, Layout.parse(text), TRAIN, H100).tokens_per_s > 0
    assert predict(model, Layout.parse("tp=2,sp,mbs=2"), replace(TRAIN, mode="forward"), H100).tokens_per_s > 0


def test_reports_carry_the_numbers() -> None:
    text = "\n".join(plan_report(PLAN, 3, "bf16"))
    assert f"{PLAN.found[0].tokens_per_s:,.0f}" in text
    assert "--tensor-model-parallel-size" in text and "--head-dim-parallel" in text
    assert f"{len(PLAN.refused)} cannot" in text
    found = predict(MODEL, Layout.parse("grid=2x4,exchange=batch,mbs=4"), TRAIN, H100)
    lines = explanation(found, H100)
    shares = [float(line.rsplit("%", 1)[0].split()[-1]) for line in lines[4:8] if line.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert any("trade qkv" in line and "all_to_all" in line for line in lines)
    replicas = explanation(predict(MODEL, Layout.parse("dp=4,mbs=2"), TRAIN, H100), H100)
    assert any("reduce gradients" in line and "reduce_scatter" in line for line in replicas)


def test_every_figure_of_a_machine_is_shown_with_its_source() -> None:
    text = "\n".join(hardware_report(H100))
    for name, parameter in H100.parameters.items():
        assert name in text and parameter.source in text
    assert "ROCm/xla@ad6eaee" in text


def test_sweeps_follow_single_predictions() -> None:
    layout = Layout.parse("tp=2,pp=2,mbs=2")
    curves = sweep_curves("micro-batches", MODEL, [layout], TRAIN, H100, 4096)
    points = dict(curves[str(layout)])
    assert set(points) == {1, 2, 4, 8, 16}
    assert points[8] == pytest.approx(predict(MODEL, layout, TRAIN, H100).tokens_per_s)
    weak = dict(sweep_curves("gpus", MODEL, [layout], TRAIN, H100, 64)[str(layout)])
    assert set(weak) == {4, 8, 16, 32, 64}
    assert 1.5 < weak[8] / weak[4] <= 2.0
    lengths = dict(sweep_curves("seq", MODEL, [layout], TRAIN, H100, 2048)[str(layout)])
    assert set(lengths) <= {128, 256, 512, 1024, 2048}
    with pytest.raises(ValueError, match="unknown sweep 'heads'"):
        sweep_curves("heads", MODEL, [layout], TRAIN, H100, 64)
    with pytest.raises(ValueError, match="no point of the seq sweep can run"):
        sweep_curves("seq", MODEL, [Layout.parse("tp=3,mbs=1")], TRAIN, H100, 2048)
