"""What a prediction says."""

from __future__ import annotations

from dataclasses import dataclass, field

from hp_plugin.planner.counts.memory import Memory
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.seconds.timeline import Event

BOTTLENECK_SHARE = 0.15
"""Share of a step beyond which waiting is called its bottleneck: a choice, above the 10 % within which two layouts are
not told apart (docs/planner.md)."""


@dataclass
class Prediction:
    """One global step, predicted; seconds are means over the pipeline's ranks.

    Args:
        step: seconds of the whole step. compute: seconds kernels run.
        share: model, layout and workload as one rank sees them.
        waiting: seconds spent in collectives and waiting for them, by group axis; `pipeline` is waiting for other
            stages and sending to them.
        hidden: seconds of collectives that ran beside kernels, by group axis.
        kernels: seconds by first kernel of each block.
        events: the simulated step, one rank of each pipeline stage.
    """

    share: Share
    step: float
    compute: float
    waiting: dict[str, float]
    hidden: dict[str, float]
    kernels: dict[str, float]
    memory: Memory
    events: list[Event] = field(default_factory=list)

    @property
    def model(self) -> ModelShape:
        """What is run."""
        return self.share.model

    @property
    def layout(self) -> Layout:
        """How it is spread."""
        return self.share.layout

    @property
    def workload(self) -> Workload:
        """On what."""
        return self.share.workload

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the step."""
        return self.share.micro_batches

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the whole job per second (TPS)."""
        return self.workload.tokens_per_step / self.step

    @property
    def tpot(self) -> float:
        """Seconds of communication and waiting per position: TPOT as the design defines it."""
        return sum(self.waiting.values()) / self.workload.new_tokens_per_sequence

    @property
    def bubble(self) -> float:
        """Share of the step spent waiting for other pipeline stages."""
        return self.waiting.get("pipeline", 0.0) / self.step

    @property
    def operations_per_s(self) -> float:
        """Model operations per second and GPU, attention counted in full, backward twice forward."""
        workload = self.workload
        seq = workload.seq
        once = self.model.matmul_operations(workload.tokens_per_step, seq)
        # Backward computes a gradient of each of a product's two factors.
        return once * (3 if workload.training else 1) / self.step / self.layout.world

    @property
    def bottleneck(self) -> str:
        """`compute`, or what is waited for most if that takes more than `BOTTLENECK_SHARE` of the step."""
        axis = max(self.waiting, key=lambda name: self.waiting[name], default="")
        if axis and self.waiting[axis] > BOTTLENECK_SHARE * self.step:
            return {"pipeline": "pipeline wait", "dp": "DP", "edp": "expert DP"}.get(axis, f"{axis} exchange")
        return "compute"
