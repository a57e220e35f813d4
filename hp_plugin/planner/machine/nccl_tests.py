"""Reads what nccl-tests prints, as curves for a machine.

Source: NVIDIA/nccl-tests `src/util.cu` (`printHeader`, `writeBenchmarkLine...`), 2.0 to 2.19: the columns between
`redop` and `time` and after the second `#wrong` differ between versions, so the header line is followed.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

from hp_plugin.planner.machine.collectives import KINDS
from hp_plugin.planner.machine.curve import TimeCurve

_NAMES = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "sendrecv": "send_recv",
}
"""Programs of nccl-tests, without `_perf`, and what they measure."""

_PREFIX = re.compile(r"^(\[\d+,\d+\]\s*(<\w+>)?:?|\d+:)\s*")
"""What mpirun --tag-output and srun --label put before every line."""
_RANK = re.compile(r"#\s+Rank\s+(\d+)\b.*?\bon\s+(\S+)\s+device\b")
_PROGRAM = re.compile(r"\b([a-z_]+)_perf(?![a-z])")
_HEADER = ["size", "count", "type", "redop", "root", *("time", "algbw", "busbw", "#wrong") * 2]
"""Columns where no header says otherwise."""


@dataclass(frozen=True)
class Measured:
    """One run: the collective, how many ranks on how many hosts, and its curve (out of place)."""

    kind: str
    ranks: int
    nodes: int
    curve: TimeCurve


@dataclass
class _Run:
    """What has been read of a run."""

    kind: str | None = None
    hosts: dict[int, str] = field(default_factory=dict)
    points: list[tuple[float, float]] = field(default_factory=list)
    header: list[str] = field(default_factory=lambda: _HEADER)


def _kind_named(name: str) -> str | None:
    """A collective by this planner's name or by nccl-tests' own; None for others."""
    return name if name in KINDS else _NAMES.get(name)


def read_nccl_tests(path: Path, kind: str | None = None) -> Measured:
    """Reads one run's output.

    Sizes follow nccl-tests: its `size` column is the larger of a rank's input and output, which is the size this
    planner uses for every collective. Of sendrecv, where every rank sends to its neighbour, the curve is a pair's.

    Args:
        kind: the collective, where the output does not name its program (`all_reduce_perf`, ...).

    Raises:
        ValueError: the file cannot be read, names no collective or rank, holds several runs, spreads ranks unevenly
            over hosts, or has a malformed line (which is named).
    """
    wanted = None if kind is None else _kind_named(kind)
    if kind is not None and wanted is None:
        raise ValueError(f"--nccl-tests {kind}={path}: unknown collective; choose from {', '.join(KINDS)}")
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"nccl-tests file {path}: {error}") from None
    run = _Run()
    for number, line in enumerate(lines, start=1):
        _take(run, path, number, _PREFIX.sub("", line.strip()))
    if wanted is not None and run.kind is not None and wanted != run.kind:
        raise ValueError(f"--nccl-tests {kind}={path}: the file says that it is {run.kind}")
    found = wanted or run.kind
    if found is None:
        raise ValueError(
            f"nccl-tests file {path}: no program name such as all_reduce_perf in it; write --nccl-tests "
            f"COLLECTIVE={path} with one of {', '.join(KINDS)}"
        )
    return _measured(path, found, run)


def _take(run: _Run, path: Path, number: int, text: str) -> None:
    """One line into the run."""
    where = f"nccl-tests file {path}, line {number}"
    starting = "Collective test starting" in text
    programs = _PROGRAM.findall(text)
    known = [name for name in programs if name in _NAMES]
    rank = _RANK.match(text)
    if run.points and (rank or starting):
        raise ValueError(f"{where}: another run begins here; give every run a file of its own")
    if known and not run.points:
        # The command itself may stand in a folder or behind a wrapper of a like name.
        run.kind = _NAMES[known[-1]]
    elif programs and starting:
        raise ValueError(f"{where}: {programs[-1]}_perf is none of {', '.join(_NAMES)}, which a layout needs")
    words = text.split()
    if rank:
        run.hosts[int(rank[1])] = rank[2]
    elif text.startswith("#"):
        if "size" in words and "busbw" in words:
            run.header = text.lstrip("# ").split()
    elif words and words[0].isdigit():
        point = _point(where, words, run.header)
        if point is not None:
            run.points.append(point)


def _point(where: str, words: list[str], header: list[str]) -> tuple[float, float] | None:
    """(bytes, seconds) of a result line; None for the empty messages that small sizes are rounded to."""
    if len(words) < len(header):
        raise ValueError(f"{where}: expected {len(header)} columns ({' '.join(header)}), got {len(words)}")
    time_column = next(at for at, word in enumerate(header) if word.startswith("time"))
    try:
        size, micros = float(words[0]), float(words[time_column])
    except ValueError:
        raise ValueError(
            f"{where}: size and time must be numbers, got {words[0]!r} and {words[time_column]!r}"
        ) from None
    if size == 0:
        return None
    if not (size > 0 and micros > 0 and isfinite(micros)):
        raise ValueError(f"{where}: size and time must be positive and finite, got {size:g}, {micros:g}")
    return size, micros * 1e-6


def _measured(path: Path, kind: str, run: _Run) -> Measured:
    if not run.hosts:
        raise ValueError(f"nccl-tests file {path}: no '#  Rank 0 ... on HOST device' line, so the group is unknown")
    if not run.points:
        raise ValueError(f"nccl-tests file {path}: no result lines")
    ranks, counts = len(run.hosts), Counter(run.hosts.values())
    if ranks == 1:
        raise ValueError(f"nccl-tests file {path}: one rank, between which nothing moves; run it on more GPUs")
    if len(set(counts.values())) > 1:
        spread = ", ".join(f"{count} on {host}" for host, count in counts.items())
        raise ValueError(f"nccl-tests file {path}: ranks are spread unevenly ({spread}); run as many on every host")
    try:
        curve = TimeCurve.from_points(run.points)
    except ValueError as error:
        raise ValueError(f"nccl-tests file {path}: {error}; give every run a file of its own") from None
    if kind == "send_recv":
        return Measured(kind, 2, min(2, len(counts)), curve)
    return Measured(kind, ranks, len(counts), curve)
