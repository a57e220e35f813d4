"""What one rank does, as lists of kernels and collectives: counts only, no times.

A `Program` is a sequence of blocks. The kernels of a block follow each other; its collectives follow them, or run
beside them (`overlap`). Predictions, traffic tables and traces all read the same programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hp_plugin.planner.machine.collectives import wire_factor


@dataclass(frozen=True)
class Gemm:
    """`batch` products of an m × k by a k × n matrix; `accumulate` adds the result to an fp32 matrix in memory."""

    name: str
    m: int
    n: int
    k: int
    batch: int = 1
    accumulate: bool = False

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.batch * self.m * self.n * self.k

    def bytes(self, itemsize: int) -> float:
        """Memory traffic if every matrix moves once."""
        result = 8 if self.accumulate else itemsize
        return self.batch * (itemsize * (self.m * self.k + self.k * self.n) + float(result) * self.m * self.n)


@dataclass(frozen=True)
class FusedAttention:
    """One fused attention kernel.

    Args:
        pairs: visible query-key pairs per head. heads: query heads of all samples. width: head dimension.
    """

    name: str
    pairs: float
    heads: int
    queries: int
    keys: int
    width: int
    causal: bool
    backward: bool = False

    @property
    def operations(self) -> float:
        """4 per pair and channel forward, 2.5 times that backward (scores are computed again)."""
        return 4.0 * self.pairs * self.heads * self.width * (2.5 if self.backward else 1.0)


@dataclass(frozen=True)
class Stream:
    """Memory-bound kernels that together read and write `bytes`; `slow` ones belong to unfused attention."""

    name: str
    bytes: float
    slow: bool = False

    @property
    def operations(self) -> float:
        """None that count."""
        return 0.0


Kernel = Gemm | FusedAttention | Stream


@dataclass(frozen=True)
class Collective:
    """One collective over a group axis, a key of `hp_plugin.planner.machine.placement.placements`.

    `bytes` is counted as nccl-tests do: all_reduce the buffer, all_gather the gathered result, reduce_scatter and
    all_to_all one rank's whole input, send_recv the message.
    """

    name: str
    kind: str
    axis: str
    bytes: float

    def received(self, ranks: int) -> float:
        """Bytes that one rank of a group of `ranks` receives."""
        return self.bytes * wire_factor(self.kind, ranks) if ranks > 1 else 0.0


@dataclass(frozen=True)
class Block:
    """Kernels, then collectives; or both side by side.

    Args:
        overlap: collectives run beside the kernels.
        behind: collectives run beside whatever kernels of the whole program have none beside them; there are none here.
        pieces: overlapped work that depends on itself piece by piece leaves one piece exposed; 0: no dependence.
    """

    kernels: tuple[Kernel, ...] = ()
    collectives: tuple[Collective, ...] = ()
    overlap: bool = False
    pieces: int = 0
    behind: bool = False


Program = tuple[Block, ...]


def kernels(program: Program) -> Iterator[Kernel]:
    """Every kernel, in order."""
    for block in program:
        yield from block.kernels


def collectives(program: Program) -> Iterator[Collective]:
    """Every collective, in order."""
    for block in program:
        yield from block.collectives


def operations(program: Program) -> float:
    """Arithmetic operations of all kernels."""
    return sum(kernel.operations for kernel in kernels(program))


def received(program: Program, sizes: dict[str, int]) -> dict[str, float]:
    """Bytes one rank receives, by group axis; `sizes` gives ranks per group."""
    totals: dict[str, float] = {}
    for collective in collectives(program):
        totals[collective.axis] = totals.get(collective.axis, 0.0) + collective.received(sizes[collective.axis])
    return totals
