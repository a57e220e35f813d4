"""Every collective that one rank takes part in during one step: what the planner prices, as a flat list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hp_plugin.planner.counts.gradients import chunk_sync, end_of_step
from hp_plugin.planner.counts.layer import Passes
from hp_plugin.planner.counts.parts import parts_of, passes_of
from hp_plugin.planner.counts.program import Collective, collectives
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.counts.stages import Stage


def step_collectives(share: Share) -> list[Counter[Collective]]:
    """Collectives of one step and how often each runs, for a rank of each pipeline stage; sizes in bytes.

    Messages between stages count where they are sent.
    """
    layout = share.layout
    found: list[Counter[Collective]] = []
    for rank in range(layout.pp):
        total: Counter[Collective] = Counter()
        chunks = share.stages[rank :: layout.pp]
        parameters = share.parameters[rank :: layout.pp]
        for chunk, stage in enumerate(chunks):
            for collective in _passes(share, stage):
                total[collective] += share.micro_batches
            sync = chunk_sync(share, parameters[chunk], rank, chunk)
            total.update((*sync.gradients, *sync.weights))
        total.update(end_of_step(share, chunks))
        found.append(total)
    return found


def sent_bytes(share: Share, sizes: dict[str, int]) -> dict[tuple[str, str], float]:
    """Bytes that a rank sends in one step, by (axis, kind), averaged over pipeline stages; `sizes`: ranks by axis."""
    totals: dict[tuple[str, str], float] = {}
    for rank in step_collectives(share):
        for collective, count in rank.items():
            key = collective.axis, collective.kind
            sent = count * collective.received(sizes[collective.axis]) / share.layout.pp
            totals[key] = totals.get(key, 0.0) + sent
    return {key: sent for key, sent in totals.items() if sent}


def _passes(share: Share, stage: Stage) -> Iterable[Collective]:
    """One micro-batch through one virtual stage, forward and, in training, backward."""
    parts: list[Passes] = []
    for part, count in parts_of(share, stage).items():
        parts += [passes_of(share, part)] * count if count else []
    training = share.workload.training
    for passes in parts:
        yield from collectives(passes.forward)
        if training:
            yield from collectives(passes.backward)
    message = Collective("activations", "send_recv", "pp", share.between_bytes)
    if not stage.last:
        yield message
    if training and not stage.first:
        yield message
