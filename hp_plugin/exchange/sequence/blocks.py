"""Which tokens of a sequence a rank caches: whole blocks of them, in turns; integers alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """Rank j's of n: block number k of `size` tokens is rank k % n's, its tokens one behind the other."""

    n: int
    j: int
    size: int

    def rows(self, tokens: int) -> int:
        """How many of the first `tokens` are this rank's."""
        turns, rest = divmod(tokens, self.n * self.size)
        return turns * self.size + min(max(rest - self.j * self.size, 0), self.size)

    def positions(self, start: int, stop: int) -> list[int]:
        """This rank's tokens among [start, stop), in order."""
        return [self._position(row) for row in range(self.rows(start), self.rows(stop))]

    def _position(self, row: int) -> int:
        block, place = divmod(row, self.size)
        return (block * self.n + self.j) * self.size + place
