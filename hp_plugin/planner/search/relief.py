"""Which one change of a layout frees most memory, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from hp_plugin.config import HeadDimConfig
from hp_plugin.planner.counts.feasibility import shape_refusals
from hp_plugin.planner.counts.memory import Memory, memory_needed
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.planner.seconds.prediction import Prediction
from hp_plugin.planner.seconds.step import predict


@dataclass(frozen=True)
class Relief:
    """A change in Megatron-LM's words, the memory that it leaves, and the speed over that of the layout as it is."""

    flags: str
    memory: Memory
    speed: float


def reliefs(found: Prediction, hardware: Hardware, number: int = 3) -> list[Relief]:
    """The changes that free most on the fullest rank, each alone, most first; at most `number` that free anything."""
    model, layout, workload = found.model, found.layout, found.workload
    made: list[Relief] = []
    for flags, changed in _changes(model, layout, workload):
        share = Share.on(hardware, model, changed, workload)
        if shape_refusals(share):
            continue
        needed = memory_needed(share)
        if needed.total < found.memory.total:
            speed = predict(model, changed, workload, hardware).tokens_per_s / found.tokens_per_s
            made.append(Relief(flags, needed, speed))
    made.sort(key=lambda each: each.memory.total)
    return made[:number]


def _changes(model: ModelShape, layout: Layout, workload: Workload) -> Iterator[tuple[str, Layout]]:
    """One flag more or less; GPUs and batch stay."""
    if not workload.training:
        return
    if layout.recompute != "full":
        yield (
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            replace(layout, recompute="full"),
        )
    if layout.recompute == "none":
        yield "--recompute-granularity selective", replace(layout, recompute="selective")
    if layout.zero == "replicated":
        yield "--use-distributed-optimizer", replace(layout, zero="optimizer")
    if layout.tp > 1 and not layout.sp:
        yield "--sequence-parallel", replace(layout, sp=True)
    if layout.micro_batch > 1:
        smaller = layout.micro_batch // 2
        yield f"--micro-batch-size {smaller}", replace(layout, micro_batch=smaller)
    if layout.dp % 2:
        return
    half = layout.dp // 2
    halved = replace(layout, dp=half, gtp=gcd(layout.gtp, half))
    if model.experts and layout.ep * 2 <= model.experts:
        yield f"--expert-model-parallel-size {layout.ep * 2}", replace(layout, ep=layout.ep * 2)
    yield f"--pipeline-model-parallel-size {layout.pp * 2}", replace(halved, pp=layout.pp * 2, vpp=1)
    yield f"--context-parallel-size {layout.cp * 2}", replace(halved, cp=layout.cp * 2)
    if layout.grid is None:
        yield f"--tensor-model-parallel-size {layout.tp * 2}", replace(halved, tp=layout.tp * 2)
    else:
        wider = HeadDimConfig(layout.m, layout.n * 2, layout.grid.exchange)
        yield f"--head-dim-parallel {wider.m},{wider.n}", replace(halved, grid=wider, tp=wider.size)
