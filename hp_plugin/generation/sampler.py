"""Chooses the next token from the scores of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hp_plugin.generation.sampling import Sampling


class Sampler:
    """Draws for each sequence from a generator of its own, so that neither layout nor company changes its text."""

    def __init__(self, how: Sampling, sequences: int) -> None:
        self._how = how
        self._generators = [torch.Generator().manual_seed(number << 32 | how.seed) for number in range(sequences)]

    def pick(self, logits: Tensor, asking: Sequence[bool]) -> list[int | None]:
        """One token of each sequence that asks for one, from `[sequences, vocabulary]`."""
        if self._how.temperature == 0:
            best: list[int] = logits.argmax(dim=-1).tolist()
            return [token if asks else None for token, asks in zip(best, asking, strict=True)]
        probabilities = self._left(logits).cpu()
        return [
            self._draw(row, generator) if asks else None
            for row, generator, asks in zip(probabilities, self._generators, asking, strict=True)
        ]

    def _left(self, logits: Tensor) -> Tensor:
        """Probabilities of the tokens that are left, 0 of the others; equally likely ones are left together."""
        probabilities = (logits.float() / self._how.temperature).softmax(dim=-1)
        if not self._how.top_k and self._how.top_p == 1:
            return probabilities
        ordered = probabilities.sort(dim=-1, descending=True).values
        least = torch.zeros_like(ordered[:, :1])
        if self._how.top_k:
            least = ordered[:, min(self._how.top_k, ordered.shape[1]) - 1, None]
        if self._how.top_p < 1:
            needed = (ordered.cumsum(dim=-1) < self._how.top_p).sum(dim=-1, keepdim=True)
            least = torch.maximum(least, ordered.gather(1, needed.clamp(max=ordered.shape[1] - 1)))
        return probabilities.where(probabilities >= least, 0.0)

    @staticmethod
    def _draw(probabilities: Tensor, generator: torch.Generator) -> int:
        # In the order of the vocabulary: where layouts differ in the last bit, no two tokens change places.
        steps = probabilities.double().cumsum(dim=0)
        drawn = torch.rand((), dtype=torch.float64, generator=generator) * steps[-1]
        return int(torch.searchsorted(steps, drawn, right=True).clamp(max=int(probabilities.nonzero()[-1])))
