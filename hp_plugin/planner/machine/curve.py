"""A measured time-against-size table, read between its points."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TimeCurve:
    """Seconds against bytes, straight between points: a latency plus bytes at a bandwidth, piece by piece.

    Below the first point the time is the first point's (latency); beyond the last one the bandwidth is the last
    point's. `from_points` makes times non-decreasing.
    """

    sizes: tuple[float, ...]
    times: tuple[float, ...]

    @classmethod
    def from_points(cls, points: Iterable[tuple[float, float]]) -> TimeCurve:
        """A curve through (bytes, seconds).

        A transfer never takes longer than a larger one of the same table: where a table says so, the
        smaller one was disturbed, and the larger one's time stands for both.

        Raises:
            ValueError: no points, a size or time that is not positive, or a size that occurs twice.
        """
        ordered = sorted(points)
        if not ordered:
            raise ValueError("a time curve needs at least one point of (bytes, seconds)")
        for size, time in ordered:
            if size <= 0 or time <= 0:
                raise ValueError(f"a time curve takes positive bytes and seconds, got ({size}, {time})")
        sizes = [size for size, _ in ordered]
        if len(set(sizes)) != len(sizes):
            twice = next(size for size in sizes if sizes.count(size) > 1)
            raise ValueError(f"{twice:g} bytes occur twice in a time curve")
        times: list[float] = []
        for _, time in reversed(ordered):
            times.append(min(time, times[-1]) if times else time)
        return cls(tuple(sizes), tuple(reversed(times)))

    def seconds(self, size: float) -> float:
        """Seconds for a transfer of `size` bytes."""
        if size <= self.sizes[0]:
            return self.times[0]
        if size >= self.sizes[-1]:
            return self.times[-1] * size / self.sizes[-1]
        right = bisect_right(self.sizes, size)
        left = right - 1
        share = (size - self.sizes[left]) / (self.sizes[right] - self.sizes[left])
        return (1 - share) * self.times[left] + share * self.times[right]

    @property
    def peak_bytes_per_s(self) -> float:
        """Bandwidth of the largest size."""
        return self.sizes[-1] / self.times[-1]
