"""The one configuration value of the plugin: the grid m × n and how its slices meet."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from math import gcd

from hp_plugin.exchange.rule import AttentionShape
from hp_plugin.exchange.rules import EXCHANGES, RULES, resolve


@dataclass(frozen=True)
class HeadDimConfig:
    """An m × n head × dimension grid and its exchange strategy.

    Args:
        m: size of the head axis (groups of whole heads).
        n: size of the dim axis (slices of every head's dimension).
        exchange: `batch`, `sequence`, `scores`, `local` or `auto`.

    Raises:
        ValueError: m or n is not a positive integer, or the exchange does not exist.
    """

    m: int
    n: int
    exchange: str = "auto"

    def __post_init__(self) -> None:
        for name, size in (("m", self.m), ("n", self.n)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise ValueError(f"head-dim-parallel {name} must be an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"head-dim-parallel {name} must be at least 1, got {size}")
        if self.exchange not in EXCHANGES:
            near = difflib.get_close_matches(str(self.exchange), EXCHANGES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown exchange {self.exchange!r}: choose from {', '.join(EXCHANGES)}{hint}")

    @classmethod
    def parse(cls, text: str, exchange: str = "auto") -> HeadDimConfig:
        """Reads "m,n", as `--head-dim-parallel` takes it.

        Raises:
            ValueError: the text is not two positive integers with a comma between them.
        """
        numbers = re.fullmatch(r"\s*([+-]?\d+)\s*,\s*([+-]?\d+)\s*", text)
        if numbers is None:
            raise ValueError(f"--head-dim-parallel takes two integers m,n (for example 4,4), got {text!r}")
        return cls(int(numbers[1]), int(numbers[2]), exchange)

    @classmethod
    def widest(cls, tensor_parallel_size: int, query_groups: int, exchange: str = "auto") -> HeadDimConfig:
        """The grid of this TP size with the widest head axis the model allows: m = gcd(TP, g)."""
        m = gcd(tensor_parallel_size, query_groups)
        return cls(m, tensor_parallel_size // m, exchange)

    @property
    def size(self) -> int:
        """P = m · n, the tensor-parallel size."""
        return self.m * self.n

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
                f"--tensor-model-parallel-size {given} contradicts --head-dim-parallel {self.m},{self.n}, "
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
                f"world size {world_size} is not a multiple of {model} (head-dim-parallel {self.m},{self.n}"
                f"{around}): start {model} ranks or a multiple, or choose a grid that divides {world_size}"
            )

    def check_heads(self, h: int, g: int, d: int) -> None:
        """Checks the grid against query heads h, query groups g and head dimension d.

        Raises:
            ValueError: m does not divide h and g, or n does not divide d; names the sizes that would.
        """
        if h % g:
            raise ValueError(f"num_attention_heads ({h}) must be a multiple of num_query_groups ({g})")
        if h % self.m or g % self.m:
            fitting = _divisors(gcd(h, g))
            raise ValueError(
                f"head-dim-parallel m={self.m} must divide both num_attention_heads ({h}) and num_query_groups "
                f"({g}): m could be {_listed(fitting)}; spread the rest of the {self.size} ranks over n"
            )
        if d % self.n:
            raise ValueError(
                f"head-dim-parallel n={self.n} must divide the head dimension kv_channels ({d}): "
                f"n could be {_listed(_divisors(d))}"
            )

    def check_shape(self, shape: AttentionShape) -> str:
        """Checks everything a layer's shape can contradict; returns the exchange that will run.

        Raises:
            ValueError: see `check_heads`, or the exchange cannot carry this micro-batch, sequence or rotary setting.
        """
        self.check_heads(shape.h, shape.g, shape.d)
        if self.n == 1:
            return "batch"  # one slice: nothing to exchange, every strategy is the identity
        return resolve(self.exchange, shape)

    @property
    def exact(self) -> bool:
        """Whether the grid computes the model's own attention (only `local` with n > 1 does not)."""
        return self.n == 1 or self.exchange == "auto" or RULES[self.exchange].exact


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
