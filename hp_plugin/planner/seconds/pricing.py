"""Seconds of programs on a machine: what computes, what waits for communication, what communication hides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hp_plugin.planner.counts.program import Block, Collective, FusedAttention, Gemm, Kernel, Program
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.planner.machine.placement import Placement, placements


def group_placements(layout: Layout, hardware: Hardware) -> dict[str, Placement]:
    """Where the groups of a layout lie on a machine, by axis."""
    sizes = (layout.tp, layout.cp, layout.dp, layout.pp, layout.ep, layout.m, layout.n)
    return placements(*sizes, hardware.domain, layout.order, layout.gtp, layout.cp_heads)


@dataclass(frozen=True)
class Span:
    """A stretch of one rank's time.

    Args:
        name: first kernel or collective. compute: seconds kernels run. exposed: seconds spent waiting for collectives.
        hidden: seconds of collectives beside kernels. axis: group of the collectives, empty without.
    """

    name: str
    compute: float
    exposed: float = 0.0
    hidden: float = 0.0
    axis: str = ""

    @property
    def seconds(self) -> float:
        """Elapsed time."""
        return self.compute + self.exposed


@dataclass
class Cost:
    """Sums over a program, in seconds; `exposed_by` and `hidden_by` by group axis, `compute_by` by kernel name."""

    compute: float = 0.0
    exposed_by: dict[str, float] = field(default_factory=dict)
    hidden_by: dict[str, float] = field(default_factory=dict)
    compute_by: dict[str, float] = field(default_factory=dict)

    @property
    def exposed(self) -> float:
        """Seconds spent waiting for collectives."""
        return sum(self.exposed_by.values())

    @property
    def seconds(self) -> float:
        """Elapsed time."""
        return self.compute + self.exposed

    def add(self, other: Cost, times: float = 1.0) -> None:
        """Adds another cost, several times."""
        self.compute += other.compute * times
        for mine, theirs in (
            (self.exposed_by, other.exposed_by),
            (self.hidden_by, other.hidden_by),
            (self.compute_by, other.compute_by),
        ):
            for key, seconds in theirs.items():
                mine[key] = mine.get(key, 0.0) + seconds * times


class Pricer:
    """Times of kernels, collectives and programs on one machine with one placement of groups.

    Args:
        fused: whether the stack is Transformer Engine's (cuDNN attention) or plain (FlashAttention-2).
    """

    def __init__(
        self, hardware: Hardware, placements: Mapping[str, Placement], itemsize: int, fused: bool = True
    ) -> None:
        self.hardware = hardware
        self.placements = placements
        self._itemsize = itemsize
        self._attention = hardware.attention_kernel(fused)
        self._efficiency = hardware["gemm_efficiency"]
        self._gap = hardware["kernel_gap_s"]
        self._taken = hardware["collective_multiprocessors"] / hardware["multiprocessors"]
        self._kernels: dict[Kernel, float] = {}
        self._collectives: dict[tuple[str, str, float], float] = {}

    def kernel(self, kernel: Kernel) -> float:
        """Seconds of one kernel (of a `Stream`, of its kernels)."""
        if kernel not in self._kernels:
            self._kernels[kernel] = self._kernel(kernel)
        return self._kernels[kernel]

    def _kernel(self, kernel: Kernel) -> float:
        hardware = self.hardware
        bandwidth = hardware["hbm_bytes_per_s"]
        if isinstance(kernel, Gemm):
            rate = (
                hardware.gemm.rate(kernel.batch, kernel.m, kernel.n, kernel.k)
                * hardware["gemm_scale"]
                * self._efficiency
            )
            seconds = max(kernel.operations / rate, kernel.bytes(self._itemsize) / bandwidth)
        elif isinstance(kernel, FusedAttention):
            seconds = self._attention.seconds(
                kernel.pairs, kernel.heads, kernel.queries, kernel.keys, kernel.width, kernel.causal, kernel.backward
            )
            seconds /= hardware["attention_scale"]
        else:
            seconds = kernel.bytes / bandwidth / (hardware["unfused_efficiency"] if kernel.slow else 1.0)
        return seconds + self._gap

    def collective(self, collective: Collective) -> float:
        """Seconds of one collective alone."""
        key = collective.kind, collective.axis, collective.bytes
        if key not in self._collectives:
            placement = self.placements[collective.axis]
            self._collectives[key] = self.hardware.collectives.seconds(collective.kind, collective.bytes, placement)
        return self._collectives[key]

    def spans(self, program: Program) -> list[Span]:
        """One or two spans per block: its kernels, then what its collectives expose; at the end what runs behind."""
        found = [span for block in program if not block.behind for span in self._block(block)]
        free = sum(span.compute for span in found if not span.axis)
        for block in program:
            for collective in block.collectives if block.behind else ():
                span, free = self._behind(collective, free)
                found.append(span)
        return found

    def _behind(self, collective: Collective, free: float) -> tuple[Span, float]:
        """A collective beside kernels that take `free` seconds alone, and how much of them it leaves."""
        communication = self.collective(collective)
        beside = min(free / (1.0 - self._taken), communication)
        used = beside * (1.0 - self._taken)
        span = Span(collective.name, self._taken * beside, communication - beside, beside, collective.axis)
        return span, max(0.0, free - used)

    def _block(self, block: Block) -> list[Span]:
        compute = sum(self.kernel(kernel) for kernel in block.kernels)
        communication = sum(self.collective(collective) for collective in block.collectives)
        name = block.kernels[0].name if block.kernels else ""
        if not communication:
            return [Span(name, compute)] if block.kernels else []
        axis = block.collectives[0].axis
        what = block.collectives[0].name
        if not block.overlap or not block.kernels:
            spans = [Span(name, compute)] if block.kernels else []
            return [*spans, Span(what, 0.0, communication, 0.0, axis)]
        # Kernels have fewer multiprocessors while a collective runs beside them.
        alone = 1.0 - self._taken
        beside = min(compute / alone, communication)
        busy = compute + self._taken * beside
        exposed = max(0.0, communication - busy)
        if block.pieces:
            exposed += min(communication, busy) / block.pieces
        return [Span(name, busy, exposed, communication - min(communication, exposed), axis)]

    def cost(self, program: Program) -> Cost:
        """Sums over the program's spans."""
        total = Cost()
        for span in self.spans(program):
            total.compute += span.compute
            if span.compute:
                total.compute_by[span.name] = total.compute_by.get(span.name, 0.0) + span.compute
            if span.axis:
                total.exposed_by[span.axis] = total.exposed_by.get(span.axis, 0.0) + span.exposed
                total.hidden_by[span.axis] = total.hidden_by.get(span.axis, 0.0) + span.hidden
        return total
