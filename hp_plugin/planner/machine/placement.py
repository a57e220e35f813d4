"""Where the ranks of each process group sit: how many fast-link domains a group spans, and how many share one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hp_plugin.grid.ranks import DIM_INNERMOST, Grid, tensor_parallel_groups


@dataclass(frozen=True)
class Placement:
    """A group of `size` ranks over `domains` fast-link domains, at least `per_domain` ranks in each."""

    size: int
    domains: int
    per_domain: int

    @classmethod
    def of(cls, ranks: list[int], domain: int) -> Placement:
        """Placement of world ranks when every `domain` consecutive ones share a domain."""
        counts: dict[int, int] = {}
        for rank in ranks:
            counts[rank // domain] = counts.get(rank // domain, 0) + 1
        return cls(len(ranks), len(counts), min(counts.values()))


@lru_cache(maxsize=4096)
def placements(
    tp: int,
    cp: int,
    dp: int,
    pp: int,
    ep: int,
    m: int,
    n: int,
    domain: int,
    order: str = DIM_INNERMOST,
    gtp: int = 1,
    cp_heads: int = 1,
) -> dict[str, Placement]:
    """The worst placement of each kind of group in Megatron-Core's default rank order tp-cp-ep-dp-pp.

    Keys: `tp`, `head` and `dim` (of the m × n grid), `cp`, `dp` (with context ranks, over which gradients are
    reduced), `pp` (two neighbouring stages), `ends` (first and last stage), `ep` and `edp` (experts and their
    replicas), and `world`; where there are such, `gtp` (ranks that share weights, behind tp) and `gdp` (their
    replicas), `cp_heads` (context ranks that trade heads) and `cp_ring` (two neighbours of the ring around them).

    Args:
        ep: ranks over which experts are spread: consecutive ranks of a pipeline stage.
        order: of the grid's ranks, `hp_plugin.grid.ranks.ORDERS`.
    """
    stage = tp * cp * dp
    # Stages that fill whole domains all look like the first one.
    starts = [0] if stage % domain == 0 else [stage * number for number in range(pp)]
    tensor_groups = tensor_parallel_groups(stage * len(starts), tp, len(starts), cp)
    grid = Grid(m, n, order)
    on_grid = m * n == tp
    ranks = range(stage)
    groups: dict[str, list[list[int]]] = {
        "tp": tensor_groups,
        "head": [group for ranks in tensor_groups for group in grid.head_groups(ranks)] if on_grid else tensor_groups,
        "dim": [group for ranks in tensor_groups for group in grid.dim_groups(ranks)] if on_grid else tensor_groups,
        "cp": [[at + base + tp * k for k in range(cp)] for at in starts for base in _bases(tp, cp, stage)],
        "dp": [[at + base + tp * k for k in range(cp * dp)] for at in starts for base in range(tp)],
        "pp": [[at + rank, at + stage + rank] for at in _before(pp, starts, stage) for rank in ranks] or [[0]],
        "ends": [[rank, rank + stage * (pp - 1)] for rank in ranks] if pp > 1 else [[0]],
        "ep": [[at + base * ep + k for k in range(ep)] for at in starts for base in range(stage // ep)],
        "edp": [[at + base + ep * k for k in range(stage // ep)] for at in starts for base in range(ep)],
        "world": [list(range(stage * pp))],
    }
    if gtp > 1:
        groups["gtp"] = [[at + base + tp * k for k in range(gtp)] for at in starts for base in _bases(tp, gtp, stage)]
        replicas = stage // (tp * gtp)
        groups["gdp"] = [[at + base + tp * gtp * k for k in range(replicas)] for at in starts for base in range(tp)]
    if cp_heads > 1:
        bases = _bases(tp, cp_heads, stage)
        groups["cp_heads"] = [[at + base + tp * k for k in range(cp_heads)] for at in starts for base in bases]
        last = tp * cp_heads if cp > cp_heads else 0
        groups["cp_ring"] = [[at + base, at + base + last] for at in starts for base in _bases(tp, cp, stage)]
    return {axis: _worst([Placement.of(ranks, domain) for ranks in members]) for axis, members in groups.items()}


def _before(pp: int, starts: list[int], stage: int) -> list[int]:
    """Where the stages begin that hand over to a next one, as far as they differ."""
    return [start for start in starts if start + stage < stage * pp]


def _bases(tp: int, cp: int, stage: int) -> list[int]:
    return [outer + inner for outer in range(0, stage, tp * cp) for inner in range(tp)]


def _worst(candidates: list[Placement]) -> Placement:
    return max(candidates, key=lambda placement: (placement.domains, -placement.per_domain))
