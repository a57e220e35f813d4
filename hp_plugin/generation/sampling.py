"""How the next token is chosen; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the most likely one, or one drawn from those that are left.

    Args:
        temperature: divides the scores; 0 takes the most likely token.
        top_k: leaves this many most likely tokens; 0 leaves all.
        top_p: leaves the most likely tokens that together have this probability.
        seed: of what is drawn.

    Raises:
        ValueError: a number that it cannot be.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"--temperature must be at least 0 (0: the most likely token), got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"--top-k must be at least 0 (0: all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed must be at least 0 and below 2**31, got {self.seed}")
