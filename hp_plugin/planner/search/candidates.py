"""Every layout worth predicting for a model on a number of GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isqrt

from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.rules import RULES
from hp_plugin.grid.ranks import DIM_INNERMOST, ORDERS
from hp_plugin.planner.inputs.layout import SERVED, Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload

MIN_CONTEXT_SHARE = 2048
"""Positions per context-parallel rank below which context parallelism is not tried."""

MAX_TENSOR_PARALLEL = 64
"""Largest TP size tried."""

PIECES = (2, 4, 8)
"""Parts of a micro-batch whose attention and trades overlap, which are tried where it has so many sequences."""


@dataclass(frozen=True)
class Search:
    """What to try beside the sizes themselves.

    Args:
        exchanges: exchanges of grids. tp_overlap: also layouts with `--tp-comm-overlap`.
        max_micro_batch: largest micro-batch. micro_batches: only layouts with this many micro-batches per step.
        tensor_parallel: only these TP sizes. served: in decode also what servers do with stock attention.
        peers: in training also weights shared by data-parallel ranks, and context parallelism by heads.
    """

    exchanges: tuple[str, ...] = tuple(RULES)
    tp_overlap: bool = False
    max_micro_batch: int = 64
    micro_batches: int | None = None
    tensor_parallel: tuple[int, ...] | None = None
    served: bool = False
    peers: bool = False


def candidate_layouts(
    model: ModelShape, gpus: int, workload: Workload, search: Search, domain: int | None = None
) -> Iterator[Layout]:
    """Layouts on `gpus` ranks that divide evenly; whether they can run the model is checked by the prediction.

    Args:
        domain: ranks of a fast-link domain; grids that span several of them are tried in both orders of their ranks
            where that makes a difference.
    """
    for tp in _tensor_sizes(gpus, search):
        for pp in _divisors(gpus // tp):
            if pp > model.layers:
                continue
            for cp in _context_sizes(gpus // (tp * pp), workload):
                dp = gpus // (tp * pp * cp)
                for grid in (None, *_grids(tp, search, domain)):
                    yield from _sized(model, workload, search, tp, grid, pp, cp, dp)
                if search.peers and workload.training:
                    for layout in _sized(model, workload, search, tp, None, pp, cp, dp):
                        yield from _peers(layout)
                for way, ranks in _served(tp) if search.served and workload.mode == "decode" else ():
                    for layout in _sized(model, workload, search, tp, None, pp, cp, dp):
                        spread = replace(layout, **{way: ranks})  # type: ignore[arg-type]
                        yield spread
                        # Helix's own; other servers trade behind attention.
                        yield from in_pieces(spread) if way == "kvp" else ()


def in_pieces(layout: Layout) -> Iterator[Layout]:
    """The same layout with trades of partial outputs beside attention, for every number of parts that is tried."""
    yield from (replace(layout, kv_pieces=parts) for parts in PIECES if layout.micro_batch % parts == 0)


def _tensor_sizes(gpus: int, search: Search) -> list[int]:
    if search.tensor_parallel is not None:
        return [size for size in _divisors(gpus) if size in search.tensor_parallel]
    return [size for size in _divisors(gpus) if size <= MAX_TENSOR_PARALLEL]


def _context_sizes(ranks: int, workload: Workload) -> list[int]:
    if workload.mode == "decode":
        return [1]
    return [cp for cp in _divisors(ranks) if cp == 1 or workload.seq // cp >= MIN_CONTEXT_SHARE]


def _peers(layout: Layout) -> Iterator[Layout]:
    """Stock layouts of rarer flags beside one."""
    if layout.zero == "full":
        return
    if layout.cp == 1:
        yield from (replace(layout, gtp=ranks) for ranks in _divisors(layout.dp) if 1 < ranks <= MAX_TENSOR_PARALLEL)
    yield from (replace(layout, cp_heads=ranks) for ranks in _divisors(layout.cp) if ranks > 1)


def _served(tp: int) -> Iterator[tuple[str, int]]:
    for ranks in _divisors(tp):
        if ranks > 1:
            yield from ((way, ranks) for way in SERVED)


def _grids(tp: int, search: Search, domain: int | None) -> Iterator[HeadDimConfig]:
    # A grid with n = 1 is stock attention.
    for n in _divisors(tp):
        if n > 1:
            for exchange in search.exchanges:
                for order in _orders(tp, n, exchange, domain):
                    yield HeadDimConfig(tp // n, n, exchange, order)


def _orders(tp: int, n: int, exchange: str, domain: int | None) -> tuple[str, ...]:
    in_one_domain = domain is None or domain % tp == 0
    return (DIM_INNERMOST,) if in_one_domain or n == tp or not RULES[exchange].head_axis else ORDERS


def _sized(
    model: ModelShape,
    workload: Workload,
    search: Search,
    tp: int,
    grid: HeadDimConfig | None,
    pp: int,
    cp: int,
    dp: int,
) -> Iterator[Layout]:
    if workload.global_batch % dp:
        return
    per_replica = workload.global_batch // dp
    decode = workload.mode == "decode"
    largest = per_replica if decode else search.max_micro_batch
    for micro_batch in (size for size in _divisors(per_replica) if size <= largest):
        if search.micro_batches is not None and per_replica // micro_batch != search.micro_batches:
            continue
        for vpp in _virtual_sizes(model, pp, per_replica // micro_batch, decode):
            for sp in (False,) if tp == 1 or decode else (False, True):
                for overlap in (False, True) if sp and search.tp_overlap else (False,):
                    for ep, moe in _experts(model, tp, cp * dp):
                        for zero in _zero(model, grid, pp, cp, dp, decode):
                            yield Layout(
                                tp, grid, pp, vpp, cp, dp, ep, sp, overlap, micro_batch, zero=zero, moe=moe
                            )  # fmt: skip


def _zero(model: ModelShape, grid: HeadDimConfig | None, pp: int, cp: int, dp: int, decode: bool) -> tuple[str, ...]:
    """The distributed optimizer, and FSDP where it is planned: stock attention and dense models without stages."""
    fully = grid is None and pp == cp == 1 and dp > 1 and not model.experts and not decode
    return ("optimizer", "full") if fully else ("optimizer",)


def _virtual_sizes(model: ModelShape, pp: int, micro_batches: int, decode: bool) -> list[int]:
    if pp == 1 or decode or model.layers % pp or micro_batches % pp:
        return [1]
    return _divisors(model.layers // pp)


def _experts(model: ModelShape, tp: int, replicas: int) -> list[tuple[int, str]]:
    if not model.experts:
        return [(1, "megatron")]
    sizes = [ep for ep in _divisors(model.experts) if (tp * replicas) % ep == 0]
    # Experts on every rank are of interest only where they cannot be spread.
    sizes = [ep for ep in sizes if ep > 1] or [1]
    return [(ep, moe) for ep in sizes for moe in ("megatron", "deepspeed")]


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return small + [number // size for size in reversed(small) if size * size < number]
