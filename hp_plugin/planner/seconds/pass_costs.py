"""Costs of the parts of a pass, worked out once for all layouts that share them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from hp_plugin.planner.counts.ends import embedding, head
from hp_plugin.planner.counts.layer import Passes, layer
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.planner.machine.placement import Placement
from hp_plugin.planner.seconds.pricing import Cost, Pricer

PARTS = ("dense", "moe", "first", "last")
"""A dense layer, a MoE layer, what precedes the first and what follows the last layer."""


def part_costs(hardware: Hardware, groups: Mapping[str, Placement], share: Share, part: str) -> tuple[Cost, Cost]:
    """Forward and backward cost of one of `PARTS` for one micro-batch; not to be changed by the caller."""
    layout = share.layout
    # Pipeline stages, replicas and the batch beyond the micro-batch do not enter a pass.
    alone = replace(layout, pp=1, vpp=1, dp=layout.dp if layout.zero == "full" else 1)
    workload = replace(share.workload, global_batch=1)
    used = tuple((axis, groups[axis]) for axis in ("tp", "dim", "cp", "ep", "dp"))
    if layout.zero != "full":
        used = used[:-1]
    return _part_costs(hardware, used, Share(share.model, alone, workload), part)


@lru_cache(maxsize=65536)
def _part_costs(
    hardware: Hardware, groups: tuple[tuple[str, Placement], ...], share: Share, part: str
) -> tuple[Cost, Cost]:
    pricer = Pricer(hardware, dict(groups), share.e, share.layout.fused)
    passes = _passes(share, part)
    return pricer.cost(passes.forward), pricer.cost(passes.backward)


def _passes(share: Share, part: str) -> Passes:
    if part == "first":
        return embedding(share)
    if part == "last":
        return head(share)
    return layer(share, part == "moe")
