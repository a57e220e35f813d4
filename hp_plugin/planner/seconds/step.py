"""The prediction: one global step of a model under a layout on a machine."""

from __future__ import annotations

from hp_plugin.planner.counts.feasibility import shape_refusals
from hp_plugin.planner.counts.gradients import end_of_step, optimizer_bytes
from hp_plugin.planner.counts.memory import Memory, memory_needed
from hp_plugin.planner.counts.parts import parts_of
from hp_plugin.planner.counts.program import Collective, Stream
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.counts.stages import Stage
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.planner.seconds.decode import decode_period
from hp_plugin.planner.seconds.gradient_overlap import gradient_ends, plan_overlap
from hp_plugin.planner.seconds.pass_costs import PassCosts, shared_costs
from hp_plugin.planner.seconds.prediction import Prediction
from hp_plugin.planner.seconds.pricing import Cost, Pricer, group_placements
from hp_plugin.planner.seconds.timeline import Event, PassTimes, Pipeline, Timeline, simulate
from hp_plugin.refusal import Refusal, RefusedError

ROUNDING_S = 1e-12
"""Waiting of less than this is what rounding leaves of a difference: one second is kept to 1e-16, sums to less."""


def predict(
    model: ModelShape, layout: Layout, workload: Workload, hardware: Hardware, full_timeline: bool = False
) -> Prediction:
    """Predicts one step.

    Args:
        full_timeline: simulate every micro-batch, for traces; else a long pipeline's steady state is simulated once
            and counted as often as it repeats.

    Raises:
        RefusedError: the layout cannot run this model; all reasons are named.
    """
    share = Share.on(hardware, model, layout, workload)
    refusals = shape_refusals(share)
    if refusals:
        raise RefusedError(refusals, f"{layout}: ")
    return predict_share(share, hardware, memory_needed(share), full_timeline)


def predict_share(share: Share, hardware: Hardware, needed: Memory, full_timeline: bool = False) -> Prediction:
    """Predicts one step of a share that has no `shape_refusals`; `needed` is its memory.

    Raises:
        RefusedError: this machine's links rule the layout out.
    """
    return _Step(share, hardware, needed).prediction(full_timeline)


class _Step:
    """Everything that one prediction works out on the way."""

    def __init__(self, share: Share, hardware: Hardware, needed: Memory) -> None:
        self.share = share
        self.needed = needed
        layout = share.layout
        self.groups = group_placements(layout, hardware)
        if layout.tp_overlap and self.groups["tp"].domains > 1:
            said = (
                f"tp_overlap (--tp-comm-overlap) needs TP ranks in one fast-link domain of {hardware.domain}, and "
                f"TP={layout.tp} spans {self.groups['tp'].domains}"
            )
            raise RefusedError([Refusal("overlap across domains", said)], f"{layout}: ")
        self.pricer = Pricer(hardware, self.groups, share.e, layout.fused)
        self.stages = share.stages
        self._chunks = [share.parameters[rank :: layout.pp] for rank in range(layout.pp)]
        self.micro_batches = share.micro_batches
        self.forward, self.backward = self._pass_costs(hardware)
        self.transfer = self._transfer()
        self.overlap = plan_overlap(share, self.pricer, self._chunks, self.forward, self.backward)

    def _pass_costs(self, hardware: Hardware) -> tuple[list[Cost], list[Cost]]:
        """Forward and backward cost of one micro-batch, per virtual stage."""
        costs = shared_costs(hardware, self.groups, self.share)
        by_kind = {stage: self._stage_costs(costs, stage) for stage in set(self.stages)}
        forward = [by_kind[stage][0] for stage in self.stages]
        return forward, [by_kind[stage][1] for stage in self.stages] if self.share.workload.training else []

    @staticmethod
    def _stage_costs(costs: PassCosts, stage: Stage) -> tuple[Cost, Cost]:
        ahead, back = Cost(), Cost()
        for part, count in parts_of(costs.share, stage).items():
            if count:
                once = costs.of(part)
                ahead.add(once[0], count)
                back.add(once[1], count)
        return ahead, back

    def _transfer(self) -> float:
        if self.share.layout.pp == 1:
            return 0.0
        message = Collective("activations", "send_recv", "pp", self.share.between_bytes)
        return self.pricer.collective(message)

    def _logits_back(self) -> float:
        """Megatron-Core's generation sends the last stage's logits to all stages; without a vocabulary, activations."""
        share = self.share
        if share.layout.pp == 1 or not share.model.vocab:
            return self.transfer
        size = float(share.workload.global_batch // share.layout.dp * share.model.vocab * share.e)
        return self.pricer.collective(Collective("logits to all stages", "send_recv", "ends", size))

    def prediction(self, full_timeline: bool) -> Prediction:
        """Puts the passes on a timeline and adds what happens once per step."""
        if self.share.workload.continuous:
            return self._continuous()
        count = self.micro_batches
        if full_timeline or count <= self._short(count):
            line = self._simulate(count, full_timeline)
            repeated = None
        else:
            # Beyond warm-up and cool-down every pp micro-batches take the same time.
            base = self._short(count)
            line, longer = self._simulate(base, False), self._simulate(base + self.share.layout.pp, False)
            repeated = (longer, (count - base) / self.share.layout.pp)
        return self._summary(line, repeated)

    def _short(self, count: int) -> int:
        # Warm-up and cool-down of 1F1B take pp - 1 micro-batches each, of an interleaved schedule less than 2 pp each
        # (2 (pp - 1) + (vpp - 1) pp passes through vpp chunks). The remainder leaves a multiple of pp to repeat.
        layout = self.share.layout
        return 4 * layout.pp + count % layout.pp

    def _simulate(self, count: int, record: bool) -> Timeline:
        layout = self.share.layout
        overlap = self.overlap
        return simulate(
            Pipeline(
                layout.pp,
                layout.vpp,
                count,
                [PassTimes(cost.seconds, cost.compute) for cost in self.forward],
                [PassTimes(cost.seconds, cost.compute) for cost in self.backward],
                self.transfer,
                blocking=layout.vpp == 1,
                gates=overlap.gates,
                first_extra=overlap.first_extra,
                last_extra=overlap.last_extra,
            ),
            record,
        )

    def _optimizer(self, rank: int) -> float:
        if not self.share.workload.training:
            return 0.0
        return self.pricer.kernel(Stream("optimizer", optimizer_bytes(self.share, self._chunks[rank])))

    def _summary(self, line: Timeline, repeated: tuple[Timeline, float] | None) -> Prediction:
        share, pp = self.share, self.share.layout.pp
        ends = gradient_ends(line, self.overlap)
        passes_end = line.seconds
        tail = max(ends) - passes_end
        closing = {
            collective: self.pricer.collective(collective)
            for collective in end_of_step(share, self.stages[pp - 1 :: pp])
        }
        optimizer = [self._optimizer(rank) for rank in range(pp)]
        after = sum(closing.values()) + max(optimizer)
        longer = (repeated[0].seconds - line.seconds) * repeated[1] if repeated else 0.0
        if share.workload.mode == "decode":
            after += self._logits_back()
        step = passes_end + longer + tail + after
        mean = Cost()
        for rank in range(pp):
            chunks = range(rank, len(self.stages), pp)
            for stage in chunks:
                mean.add(self.forward[stage], self.micro_batches / pp)
                if self.backward:
                    mean.add(self.backward[stage], self.micro_batches / pp)
        for seconds in optimizer:
            mean.add(Cost(seconds, {}, {}, {"optimizer": seconds} if seconds else {}), 1 / pp)
        # What data-parallel traffic takes from the kernels beside it is kernel time, too.
        mean.compute += (sum(self.overlap.first_extra.values()) + sum(self.overlap.last_extra.values())) / pp
        waiting = dict(mean.exposed_by)
        waiting["dp"] = waiting.get("dp", 0.0) + tail + sum(line.gated) / pp
        for collective, seconds in closing.items():
            waiting[collective.axis] = waiting.get(collective.axis, 0.0) + seconds
        waiting["pipeline"] = step - mean.compute - sum(waiting.values())
        self._finish_events(line, passes_end + tail, closing, optimizer)
        return Prediction(
            share,
            step,
            mean.compute,
            {axis: seconds for axis, seconds in waiting.items() if seconds > ROUNDING_S},
            mean.hidden_by,
            mean.compute_by,
            self.needed,
            line.events,
        )

    def _finish_events(
        self, line: Timeline, at: float, closing: dict[Collective, float], optimizer: list[float]
    ) -> None:
        for collective, seconds in closing.items():
            for rank in range(len(optimizer)):
                line.events.append(Event(rank, "optimizer", collective.name, at, at + seconds))
            at += seconds
        for rank, seconds in enumerate(optimizer):
            if seconds:
                line.events.append(Event(rank, "optimizer", "optimizer", at, at + seconds))

    def _continuous(self) -> Prediction:
        share = self.share
        period = decode_period([cost.seconds for cost in self.forward], self.transfer, self.micro_batches)
        mean = Cost()
        for cost in self.forward:
            mean.add(cost, self.micro_batches / share.layout.pp)
        waiting = dict(mean.exposed_by)
        waiting["pipeline"] = period - mean.seconds
        return Prediction(
            share,
            period,
            mean.compute,
            {axis: seconds for axis, seconds in waiting.items() if seconds > ROUNDING_S},
            mean.hidden_by,
            mean.compute_by,
            self.needed,
        )
