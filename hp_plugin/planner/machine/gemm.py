"""How long a matrix multiplication takes, from a table of measured rates by shape."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import exp, log, log2
from pathlib import Path
from typing import Any

from hp_plugin.refusal import shown

TILE = 128
"""Output columns below which a tensor-core tile is padded (H100 CUTLASS tiles are 128 wide), unless the table itself
was measured below them."""

LARGEST, LOWEST, HIGHEST = 10**9, 1.0, 1e21
"""Sizes of matrices, and operations per second, beyond which a table is damaged."""
_AXES = ("batch", "m", "n", "k")


class GemmTable:
    """Rates over a full grid of (batch, m, n, k), powers of two, straight between points on log axes.

    Args:
        rows: (batch, m, n, k, operations per second), every combination of the values that occur once.
        source: where the figures come from.

    Raises:
        ValueError: a value that is not positive, or a combination that is missing or given twice.
    """

    def __init__(self, rows: Iterable[tuple[int, int, int, int, float]], source: str) -> None:
        self.source = source
        self._log_rate: dict[tuple[int, ...], float] = {}
        for *shape, rate in rows:
            key = tuple(int(size) for size in shape)
            if not 0 < min(key) <= max(key) < LARGEST or not LOWEST < rate < HIGHEST:
                said = ", ".join(shown(value) for value in (*key, rate))
                raise ValueError(f"GEMM table: batch, m, n, k and rate must be positive sizes and a rate, got {said}")
            if key in self._log_rate:
                raise ValueError(f"GEMM table: shape {key} is given twice")
            self._log_rate[key] = log(rate)
        self._axes = [sorted({key[axis] for key in self._log_rate}) for axis in range(4)]
        if not self._log_rate:
            raise ValueError("GEMM table: no rows")
        for key in product(*self._axes):
            if key not in self._log_rate:
                named = ", ".join(f"{name}={size}" for name, size in zip(_AXES, key, strict=True))
                raise ValueError(f"GEMM table: no row for {named}; the table must be a full grid of its sizes")
        self.rate = lru_cache(maxsize=None)(self._rate)

    @classmethod
    def from_csv(cls, path: Path) -> GemmTable:
        """Reads a table with the columns batch, m, n, k and tflops (10¹² operations per second).

        Raises:
            ValueError: a column is missing or a line is malformed; the message names the line.
        """
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in (*_AXES, "tflops") if name not in _columns(reader, path)]
            if missing:
                raise ValueError(f"{path}, line 1: GEMM table needs the columns batch,m,n,k,tflops; missing {missing}")
            rows = []
            for record in _records(reader, path):
                try:
                    batch, m, n, k = (int(record[name]) for name in _AXES)
                    rows.append((batch, m, n, k, float(record["tflops"]) * 1e12))
                except (TypeError, ValueError):
                    got = shown(",".join(str(value) for value in record.values()))
                    raise ValueError(
                        f"{path}, line {reader.line_num}: expected four integers and a number, got {got[1:-1]}"
                    ) from None
        try:
            return cls(rows, str(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def peak(self) -> float:
        """The best rate in the table, operations per second."""
        return exp(max(self._log_rate.values()))

    def _rate(self, batch: int, m: int, n: int, k: int) -> float:
        """Operations per second at this shape, padding of few columns paid for.

        Fewer rows than the table has keep its rate: libraries split k over multiprocessors that would be idle. Such
        products are bound by memory bandwidth, which is priced elsewhere.
        """
        rows, columns = max(m, self._axes[1][0]), max(n, min(TILE, self._axes[2][0]))
        # Beyond the table more matrices or columns are more output tiles, which is all that a longer m is.
        widest, largest = self._axes[2][-1], self._axes[0][-1]
        m_tiles = rows * max(1.0, columns / widest) * max(1.0, batch / largest)
        batch = min(batch, largest)
        point = (float(batch), m_tiles, float(columns), float(k))
        rate = exp(sum(weight * self._log_rate[key] for key, weight in self._corners(point)))
        return rate * (n / columns)

    def _corners(self, point: tuple[float, ...]) -> list[tuple[tuple[int, ...], float]]:
        """Table shapes around a point and their weights; below the table the lowest slope goes on."""
        sides: list[list[tuple[int, float]]] = []
        for axis, value in zip(self._axes, point, strict=True):
            value = min(value, axis[-1])
            upper = next((at for at in range(1, len(axis)) if value <= axis[at]), len(axis) - 1)
            if upper == 0 or len(axis) == 1:
                sides.append([(axis[0], 1.0)])
                continue
            low, high = axis[upper - 1], axis[upper]
            share = log2(value / low) / log2(high / low)
            sides.append([(low, 1.0 - share), (high, share)])
        return [
            (tuple(size for size, _ in corner), _product(weight for _, weight in corner)) for corner in product(*sides)
        ]


def _columns(reader: csv.DictReader[str], path: Path) -> Sequence[str]:
    try:
        return reader.fieldnames or []
    except csv.Error as error:
        raise ValueError(f"{path}: no table ({error})") from None


def _records(reader: csv.DictReader[str], path: Path) -> Iterator[dict[str | Any, str | Any]]:
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no line of a table ({error})") from None


def _product(factors: Iterable[float]) -> float:
    total = 1.0
    for factor in factors:
        total *= factor
    return total
