"""Costs of the parts of a pass, worked out once for all layouts that share them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from hp_plugin.planner.counts.parts import passes_of
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.planner.machine.placement import Placement
from hp_plugin.planner.seconds.pricing import Cost, Pricer


class PassCosts:
    """Forward and backward costs of a stage's parts for one micro-batch, each worked out when it is first asked for."""

    def __init__(self, hardware: Hardware, groups: Mapping[str, Placement], share: Share) -> None:
        self._hardware, self._groups, self.share = hardware, groups, share
        self._known: dict[str, tuple[Cost, Cost]] = {}

    def of(self, part: str) -> tuple[Cost, Cost]:
        """Forward and backward cost of a part of `parts_of`; not to be changed by the caller."""
        if part not in self._known:
            pricer = Pricer(self._hardware, self._groups, self.share.e, self.share.layout.fused)
            passes = passes_of(self.share, part)
            self._known[part] = pricer.cost(passes.forward), pricer.cost(passes.backward)
        return self._known[part]


def shared_costs(hardware: Hardware, groups: Mapping[str, Placement], share: Share) -> PassCosts:
    """The costs that a share has in common with every other whose passes look the same."""
    layout = share.layout
    sharded = layout.zero == "full"
    axes = ("tp", "head", "dim", "cp", "ep", *(("dp",) if sharded else ()))
    # Pipeline stages, replicas and the batch beyond the micro-batch do not enter a pass.
    alone = replace(layout, pp=1, vpp=1, dp=layout.dp if sharded else layout.gtp)
    workload = replace(share.workload, global_batch=1)
    rarer = [axis for axis in ("gtp", "cp_heads", "cp_ring") if axis in groups]
    used = tuple((axis, groups[axis]) for axis in (*axes, *rarer))
    return _costs(hardware, used, replace(share, layout=alone, workload=workload))


@lru_cache(maxsize=65536)
def _costs(hardware: Hardware, groups: tuple[tuple[str, Placement], ...], share: Share) -> PassCosts:
    return PassCosts(hardware, dict(groups), share)
