"""Reads what nccl-tests prints, as curves for a machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hp_plugin.cost.collectives import KINDS
from hp_plugin.cost.curve import TimeCurve

_BINARIES = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "sendrecv": "send_recv",
    "send_recv": "send_recv",
}
_RANK = re.compile(r"#\s+Rank\s+(\d+)\b.*?\bon\s+(\S+)\s+device\b")
_BINARY = re.compile(r"\b(all_reduce|all_gather|reduce_scatter|alltoall|sendrecv)_perf\b")
_COLUMNS = 13
"""size, count, type, redop, root, then time, algbw, busbw, #wrong out of place and in place."""


@dataclass(frozen=True)
class Measured:
    """One run: the collective, how many ranks on how many hosts, and its curve (out of place)."""

    kind: str
    ranks: int
    nodes: int
    curve: TimeCurve


def read_nccl_tests(path: Path, kind: str | None = None) -> Measured:
    """Reads one run's output.

    Sizes follow nccl-tests: its `size` column is the larger of a rank's input and output, which is the size this
    planner uses for every collective.

    Args:
        kind: the collective, where the output does not name its program (`all_reduce_perf`, ...).

    Raises:
        ValueError: the file cannot be read, names no collective or rank, or has a malformed line (which is named).
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"--nccl-tests {kind}={path}: unknown collective; choose from {', '.join(KINDS)}")
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"nccl-tests file {path}: {error}") from None
    ranks: dict[int, str] = {}
    points: list[tuple[float, float]] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        binary = _BINARY.search(text)
        if binary and kind is None:
            kind = _BINARIES[binary[1]]
        rank = _RANK.match(text)
        if rank:
            ranks[int(rank[1])] = rank[2]
        elif text and text[0].isdigit():
            points.append(_point(path, number, text))
    if kind is None:
        raise ValueError(
            f"nccl-tests file {path}: no program name such as all_reduce_perf in it; write --nccl-tests "
            f"all_reduce={path}"
        )
    if not ranks:
        raise ValueError(f"nccl-tests file {path}: no '#  Rank 0 ... on HOST device' line, so the group is unknown")
    if not points:
        raise ValueError(f"nccl-tests file {path}: no result lines")
    try:
        curve = TimeCurve.from_points(points)
    except ValueError as error:
        raise ValueError(f"nccl-tests file {path}: {error}") from None
    return Measured(kind, len(ranks), len(set(ranks.values())), curve)


def _point(path: Path, number: int, text: str) -> tuple[float, float]:
    fields = text.split()
    if len(fields) != _COLUMNS:
        raise ValueError(
            f"nccl-tests file {path}, line {number}: expected {_COLUMNS} columns (size count type redop root, then "
            f"time algbw busbw #wrong twice), got {len(fields)}"
        )
    try:
        size, micros = float(fields[0]), float(fields[5])
    except ValueError:
        raise ValueError(
            f"nccl-tests file {path}, line {number}: size and time must be numbers, got {fields[0]!r} and {fields[5]!r}"
        ) from None
    if size <= 0 or micros <= 0:
        raise ValueError(
            f"nccl-tests file {path}, line {number}: size and time must be positive, got {size:g}, {micros:g}"
        )
    return size, micros * 1e-6
