"""Shard replay: one rank's kernels of every layout, at full size, one after the other, beside the planner's times."""

from __future__ import annotations

from typing import Any

from hp_plugin.bench.gpu.kernels import Bench
from hp_plugin.exchange.rules import RULES
from hp_plugin.planner.counts.feasibility import shape_refusals
from hp_plugin.planner.counts.layer import layer_passes
from hp_plugin.planner.counts.program import FusedAttention, Gemm, Kernel, Program, kernels
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.planner.seconds.pricing import Pricer
from hp_plugin.planner.seconds.step import predict
from hp_plugin.refusal import RefusedError

EXCHANGES = tuple(name for name, rule in RULES.items() if rule.exact)


def layouts(ranks: int, micro_batch: int, experts: bool) -> list[str]:
    """The source's baseline, stock at full TP, and every grid of as many ranks; experts are DeepSpeed-MoE's, over 8."""
    beside = f",mbs={micro_batch}" + (",moe=deepspeed,ep=8" if experts else "")
    found = [f"tp={ranks // 2},pp=2{beside}", f"tp={ranks}{beside}"]
    m = ranks // 2
    while m:
        found += [f"grid={m}x{ranks // m},exchange={name}{beside}" for name in EXCHANGES]
        m //= 2
    return found


def replayed(
    bench: Bench, model: ModelShape, workload: Workload, texts: list[str], machines: dict[str, Hardware]
) -> list[dict[str, Any]]:
    """A row per layout: measured seconds of one layer and micro-batch by kind of kernel, and what machines make of it.

    That is, their seconds for the same kernels, and the tokens/s that the planner predicts for all ranks with them; or
    why the layout cannot run.

    Args:
        machines: by name; the first decides which attention kernel there is.
    """
    return [_row(bench, model, workload, text, machines) for text in texts]


def _row(
    bench: Bench, model: ModelShape, workload: Workload, text: str, machines: dict[str, Hardware]
) -> dict[str, Any]:
    layout = Layout.parse(text)
    share = Share.on(next(iter(machines.values())), model, layout, workload)
    refusals = shape_refusals(share)
    if refusals:
        return {"layout": text, "refused": "; ".join(refusal.text for refusal in refusals)}
    passes = layer_passes(share, moe=model.is_moe(model.layers - 1))
    by_pass = {"forward": passes.forward, "backward": passes.backward}
    row: dict[str, Any] = {
        "layout": text,
        "measured_s": {name: _by_kind(bench, program) for name, program in by_pass.items()},
        "planned_s": {},
        "tokens_per_s": {},
    }
    for name, hardware in machines.items():
        # What a kernel alone takes; a running model's clocks and caches are `gemm_efficiency`'s.
        pricer = Pricer(hardware.with_parameter("gemm_efficiency", 1.0, "assumed", "alone"), {}, share.e, layout.fused)
        row["planned_s"][name] = {
            one: sum(pricer.kernel(kernel) for kernel in kernels(program)) for one, program in by_pass.items()
        }
        try:
            row["tokens_per_s"][name] = predict(model, layout, workload, hardware).tokens_per_s
        except RefusedError as refused:
            row["tokens_per_s"][name] = None
            row["refused"] = " ".join(str(refused).split())
    return row


def _by_kind(bench: Bench, program: Program) -> dict[str, float]:
    totals: dict[str, float] = {}
    for kernel in kernels(program):
        kind = _kind(kernel)
        totals[kind] = totals.get(kind, 0.0) + bench.seconds(kernel)
    return totals


def _kind(kernel: Kernel) -> str:
    if isinstance(kernel, Gemm):
        return "products"
    return "attention" if isinstance(kernel, FusedAttention) else "memory"
