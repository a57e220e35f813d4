"""The one configuration value of the plugin: the grid m × n and how its slices meet."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import gcd, isqrt

from hp_plugin.exchange.rules import AUTO, EXCHANGES, RULES, candidates, resolve
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.grid.ranks import DIM_INNERMOST, Grid
from hp_plugin.refusal import Refusal, RefusedError, shown

WIDEST = "auto"
"""What flags take in place of m,n for the widest head axis that a given TP size allows."""
_SEARCHED, _LISTED = 10**5, 8
"""Up to where divisors are looked for, and how many a message names: messages stay short, and come at once."""
_DIGITS = 9
"""Of a number of ranks."""


@dataclass(frozen=True)
class HeadDimConfig:
    """An m × n head × dimension grid and its exchange strategy.

    Args:
        m: size of the head axis (groups of whole heads).
        n: size of the dim axis (slices of every head's dimension).
        exchange: `batch`, `sequence`, `scores`, `weights`, `local` or `auto`.
        order: which axis has neighbouring TP ranks, `dim-innermost` or `head-innermost`. Who owns which slice does not
            depend on it, so checkpoints do not either.

    `grid` is the arrangement of the ranks that m, n and the order make.

    Raises:
        ValueError: m or n is not a positive integer, or the exchange or the order does not exist.
    """

    m: int
    n: int
    exchange: str = AUTO
    order: str = DIM_INNERMOST
    grid: Grid = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", Grid(self.m, self.n, self.order))
        if self.exchange not in EXCHANGES:
            near = difflib.get_close_matches(shown(self.exchange), EXCHANGES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown exchange {shown(self.exchange)}: choose from {', '.join(EXCHANGES)}{hint}")

    @classmethod
    def of(
        cls, head_dim: HeadDimConfig | str | Sequence[int], exchange: str | None = None, order: str | None = None
    ) -> HeadDimConfig:
        """The configuration that a caller means by itself, by "m,n" or by a pair (m, n), which leave the rest open.

        Raises:
            ValueError: it is none of these, names no grid, or has another exchange or order than is given beside it.
        """
        if isinstance(head_dim, HeadDimConfig):
            given = replace(head_dim, exchange=exchange or head_dim.exchange, order=order or head_dim.order)
            if given != head_dim:
                raise ValueError(f"{' '.join(given.flags)} contradicts {' '.join(head_dim.flags)}: give one of them")
            return head_dim
        if isinstance(head_dim, str):
            return cls.parse(head_dim, exchange or AUTO, order or DIM_INNERMOST)
        if isinstance(head_dim, (tuple, list)) and len(head_dim) == 2:
            return cls(head_dim[0], head_dim[1], exchange or AUTO, order or DIM_INNERMOST)
        raise ValueError(
            f'head_dim_parallel takes a HeadDimConfig, "m,n" or a pair (m, n), for example HeadDimConfig(4, 4); '
            f"got {shown(head_dim)}"
        )

    @classmethod
    def parse(cls, text: str, exchange: str = AUTO, order: str = DIM_INNERMOST) -> HeadDimConfig:
        """Reads "m,n", as `--head-dim-parallel` takes it.

        Raises:
            ValueError: the text is not two positive integers with a comma between them.
        """
        numbers = re.fullmatch(rf"\s*([+-]?\d{{1,{_DIGITS}}})\s*,\s*([+-]?\d{{1,{_DIGITS}}})\s*", text, re.ASCII)
        if numbers is None:
            raise ValueError(f"--head-dim-parallel takes two integers m,n (for example 4,4), got {shown(text)}")
        return cls(int(numbers[1]), int(numbers[2]), exchange, order)

    @classmethod
    def widest(
        cls, tensor_parallel_size: int, query_groups: int, exchange: str = AUTO, order: str = DIM_INNERMOST
    ) -> HeadDimConfig:
        """The grid of this TP size with the widest head axis the model allows: m = gcd(TP, g)."""
        m = gcd(tensor_parallel_size, query_groups)
        return cls(m, tensor_parallel_size // m, exchange, order)

    @property
    def size(self) -> int:
        """P = m · n, the tensor-parallel size."""
        return self.grid.size

    @property
    def flag(self) -> str:
        """m and n as `--head-dim-parallel` takes them and checkpoints keep them: "m,n"."""
        return f"{self.m},{self.n}"

    @property
    def flags(self) -> list[str]:
        """All of it as command lines take it; the order where it is not the default one."""
        said = [f"--head-dim-parallel {self.flag}", f"--head-dim-exchange {self.exchange}"]
        return said if self.order == DIM_INNERMOST else [*said, f"--head-dim-order {self.order}"]

    def with_exchange(self, exchange: str) -> HeadDimConfig:
        """The same grid under another exchange."""
        return replace(self, exchange=exchange)

    def check_tensor_parallel_size(self, given: int | None) -> None:
        """Refuses a tensor-parallel size that contradicts the grid.

        Raises:
            ValueError: both are given and differ.
        """
        if given is not None and given != self.size:
            raise ValueError(
                f"--tensor-model-parallel-size {given} contradicts --head-dim-parallel {self.flag}, "
                f"which sets it to m·n = {self.size}: give one of them, or equal sizes"
            )

    def check_world_size(self, world_size: int, pipeline: int = 1, context: int = 1) -> None:
        """Refuses a world that the grid, with its pipeline and context parallelism, does not divide.

        Raises:
            ValueError: world_size is no multiple of m · n · pipeline · context.
        """
        model = self.size * pipeline * context
        if world_size % model:
            around = "".join(f" × {name}={size}" for name, size in (("PP", pipeline), ("CP", context)) if size > 1)
            raise ValueError(
                f"world size {world_size} is not a multiple of {model} (head-dim-parallel {self.flag}"
                f"{around}): start {model} ranks or a multiple, or choose a grid that divides {world_size}"
            )

    def check_heads(self, h: int, g: int, d: int) -> None:
        """Checks the grid against query heads h, query groups g and head dimension d.

        Raises:
            RefusedError: m does not divide h and g, or n does not divide d; names the sizes that would.
        """
        for name, size in (("num_attention_heads", h), ("num_query_groups", g), ("kv_channels", d)):
            if size < 1:
                raise RefusedError([Refusal("size", f"{name} must be positive, got {shown(size)}")])
        if h % g:
            said = f"num_attention_heads ({h}) must be a multiple of num_query_groups ({g})"
            raise RefusedError([Refusal("heads per group", said)])
        if h % self.m or g % self.m:
            said = (
                f"head-dim-parallel m={self.m} must divide both num_attention_heads ({h}) and num_query_groups "
                f"({g}): {self._fitting_grids(h, g, d)}"
            )
            raise RefusedError([Refusal("grid heads", said)])
        if d % self.n:
            said = (
                f"head-dim-parallel n={self.n} must divide the head dimension kv_channels ({d}): "
                f"{self._fitting_grids(h, g, d)}"
            )
            raise RefusedError([Refusal("grid head dimension", said)])

    def _fitting_grids(self, h: int, g: int, d: int) -> str:
        """The grids of as many ranks that these heads allow; where there are none, what m and n could be."""
        widest = gcd(h, g)
        grids = [f"{m},{self.size // m}" for m in _divisors(gcd(widest, self.size)) if d % (self.size // m) == 0]
        if grids:
            return f"{self.size} ranks could be {_listed(grids, 'or')}"
        return (
            f"no grid of {self.size} ranks fits; m could be {_listed(_divisors(widest))}, and n {_listed(_divisors(d))}"
        )

    def without_slices(self, h: int | None, g: int | None) -> str:
        """The way out where slices are: a grid with n = 1, as far as h heads and g query groups allow it."""
        if h is None or g is None:
            return "use a grid with n=1"
        fitting = _divisors(gcd(h, g))
        if self.size in fitting:
            return f"use n=1 (--head-dim-parallel {self.size},1)"
        return f"use n=1, where m could be {_listed(fitting)}"

    def check_shape(self, shape: AttentionShape) -> str:
        """Checks everything a layer's shape can contradict; returns the exchange that will run.

        Raises:
            RefusedError: see `check_heads`, or the exchange cannot carry this micro-batch, sequence or rotary setting.
        """
        self.check_heads(shape.h, shape.g, shape.d)
        return resolve(self.exchange, shape)

    @property
    def moves_weights(self) -> bool:
        """Whether weights move, or may move, instead of activations."""
        return any(RULES[name].moves_weights for name in candidates(self.exchange, self.n))

    @property
    def chooses(self) -> bool:
        """Whether each pass is left to choose."""
        return len(candidates(self.exchange, self.n)) > 1

    @property
    def always_moves_weights(self) -> bool:
        """Whether nothing else is left to choose."""
        return all(RULES[name].moves_weights for name in candidates(self.exchange, self.n))

    @property
    def exact(self) -> bool:
        """Whether the grid computes the model's own attention (only `local` with n > 1 does not)."""
        return all(RULES[name].exact for name in candidates(self.exchange, self.n))


def _divisors(number: int) -> list[int]:
    low = [k for k in range(1, min(isqrt(number), _SEARCHED) + 1) if number % k == 0]
    return sorted({*low, *(number // k for k in low)})


def _listed(values: Sequence[object], last: str = "") -> str:
    """The first of them; `last` in front of the last one, where all are listed."""
    words = list(map(str, values))
    if len(words) > _LISTED:
        return ", ".join(words[:_LISTED]) + ", …"
    return ", ".join(words[:-1]) + f" {last} {words[-1]}" if last and len(words) > 1 else ", ".join(words)
