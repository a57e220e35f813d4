"""One rank's share of one micro-batch, in local sizes."""

from __future__ import annotations

from dataclasses import dataclass

from hp_plugin.exchange.rule import AttentionShape
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload


@dataclass(frozen=True)
class Share:
    """Model, layout and workload, and what follows for one rank and micro-batch."""

    model: ModelShape
    layout: Layout
    workload: Workload

    @property
    def P(self) -> int:
        """Tensor-parallel size."""
        return self.layout.tp

    @property
    def e(self) -> int:
        """Bytes of an element."""
        return self.workload.itemsize

    @property
    def b(self) -> int:
        """Sequences in a micro-batch."""
        return self.layout.micro_batch

    @property
    def s(self) -> int:
        """Positions of each sequence that this rank's context-parallel share computes."""
        return self.workload.new_tokens_per_sequence // self.layout.cp

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one context-parallel rank."""
        return self.b * self.s

    @property
    def sp(self) -> bool:
        """Whether sequence parallelism is on and there is something to shard."""
        return self.layout.sp and self.P > 1

    @property
    def hidden_bytes(self) -> float:
        """Bytes of one [s, b, D] activation."""
        return float(self.tokens * self.model.D * self.e)

    @property
    def between_bytes(self) -> float:
        """Bytes of the activation between layers on one rank: a P-th with sequence parallelism."""
        return self.hidden_bytes / (self.P if self.sp else 1)

    @property
    def heads(self) -> int:
        """Query heads one rank holds in core attention (whole or, under `scores`, slices)."""
        return self.model.h // self.layout.m

    @property
    def groups(self) -> int:
        """Key/value heads one rank works on; stock ranks beyond g share one."""
        return max(1, self.model.g // self.layout.m)

    @property
    def gathers_qkv(self) -> bool:
        """Whether stock attention has fewer key/value heads than ranks and gathers QKV over the TP group."""
        return self.layout.grid is None and self.model.g < self.P

    @property
    def qkv_bytes(self) -> float:
        """Bytes of one rank's part of the QKV projection's output."""
        return (self.model.h + 2 * self.model.g) * self.model.d / self.P * self.tokens * self.e

    @property
    def context_bytes(self) -> float:
        """Bytes of one rank's part of the attention output."""
        return self.model.h * self.model.d / self.P * self.tokens * self.e

    @property
    def attention_shape(self) -> AttentionShape:
        """The layer as the exchange rules see it (on a 1-slice grid of TP heads without a grid)."""
        return AttentionShape(
            s=self.workload.new_tokens_per_sequence,
            b=self.b,
            h=self.model.h,
            g=self.model.g,
            d=self.model.d,
            m=self.layout.m,
            n=self.layout.n,
            rotary=self.model.d if self.model.rotary else 0,
        )

    @property
    def exchange(self) -> str | None:
        """The exchange that runs, or None where there is nothing to exchange (no grid, or n = 1).

        Raises:
            ValueError: the grid's exchange cannot carry this shape.
        """
        grid = self.layout.grid
        if grid is None or grid.n == 1:
            return None
        return grid.check_shape(self.attention_shape)
