"""Logs of nccl-tests as curves for a machine: runs joined, repeated cycles by their median, what is no measurement
refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from hp_plugin.planner.machine.collectives import KINDS
from hp_plugin.planner.machine.curve import TimeCurve
from hp_plugin.planner.machine.nccl_log import CPU_TIME_DIGITS, NAMES, Row, Run, read_runs

_TYPES = ("bfloat16", "half", "float")
"""Element types in the order in which training uses them; of others the first in the log."""
_OPERATIONS = ("sum", "none")
"""What training asks for: sums, and no operation where nothing is reduced."""


@dataclass(frozen=True)
class Measured:
    """A collective, how many ranks on how many hosts, its curve (out of place), and what was chosen or left out."""

    kind: str
    ranks: int
    nodes: int
    curve: TimeCurve
    notes: tuple[str, ...] = ()


def read_nccl_tests(path: Path, kind: str | None = None) -> Measured:
    """The one measurement of a log.

    Raises:
        ValueError: as `read_nccl_log`, or several collectives or groups.
    """
    found = read_nccl_log(path, kind)
    if len(found) > 1:
        said = ", ".join(f"{each.kind} on {each.ranks} ranks" for each in found)
        raise ValueError(f"nccl-tests file {path}: holds {said}")
    return found[0]


def read_nccl_log(path: Path, kind: str | None = None) -> list[Measured]:
    """Every collective and group that a log measured, one curve each.

    Sizes follow nccl-tests: its `size` column is the larger of a rank's input and output, which is the size this
    planner uses for every collective. Of sendrecv, where every rank sends to its neighbour, the curve is a pair's.
    Runs and cycles of the same collective on as many ranks and hosts are joined by their median.

    Args:
        kind: the collective, where the output does not name its program (`all_reduce_perf`, ...).

    Raises:
        ValueError: the file cannot be read, names no collective or rank, mixes outputs, failed or checked wrong,
            spreads ranks unevenly over hosts, or has a malformed line (which is named).
    """
    wanted = None if kind is None else kind if kind in KINDS else NAMES.get(kind)
    if kind is not None and wanted is None:
        raise ValueError(f"--nccl-tests {kind}={path}: unknown collective; choose from {', '.join(KINDS)}")
    file = f"nccl-tests file {path}"
    runs = read_runs(_lines(path), file)
    if not runs:
        raise ValueError(f"{file}: neither a '#  Rank 0 ... on HOST device' line nor result lines")
    joined: dict[tuple[str, int, int], list[Run]] = {}
    skipped = []
    for run in runs:
        if run.not_needed is not None:
            skipped.append(run.not_needed)
            continue
        if run.failure:
            raise ValueError(run.failure)
        if run.hosts and not run.rows:
            raise ValueError(f"{file}: no result lines after rank {max(run.hosts)} was listed")
        found = _kind(run, wanted, kind, path, len(runs))
        if found is not None:
            joined.setdefault((found, *_group(run, file)), []).append(run)
    if not joined:
        raise ValueError(skipped[0] if len(skipped) == len(runs) else f"{file}: no run of {wanted} in it")
    return [_measured(file, *key, members, tuple(skipped)) for key, members in joined.items()]


def _lines(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"nccl-tests file {path}: {error.strerror}") from None
    # Shells of other systems write UTF-16; bytes of no encoding stand in lines that are not nccl-tests' own.
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return raw.decode(encoding, errors="replace").splitlines()


def _kind(run: Run, wanted: str | None, kind: str | None, path: Path, runs: int) -> str | None:
    """The collective of a run, or None if another one of the file is wanted."""
    if wanted is not None and run.kind is not None and wanted != run.kind:
        if runs > 1:
            return None
        raise ValueError(f"--nccl-tests {kind}={path}: the file says that it is {run.kind}")
    found = wanted or run.kind
    if found is None:
        raise ValueError(
            f"nccl-tests file {path}: no program name such as all_reduce_perf in it; write --nccl-tests "
            f"COLLECTIVE={path} with one of {', '.join(KINDS)}"
        )
    return found


def _group(run: Run, file: str) -> tuple[int, int]:
    """(ranks, hosts) of the group that every one of the run's parallel operations spans."""
    if not run.hosts:
        raise ValueError(f"{file}: no '#  Rank 0 ... on HOST device' line, so the group is unknown")
    if len(run.hosts) <= max(run.hosts):
        lost = min(set(range(max(run.hosts))) - set(run.hosts))
        raise ValueError(f"{file}: rank {lost} of {max(run.hosts) + 1} is not listed")
    shapes = set()
    for number in set(run.groups.values()):
        counts = Counter(host for rank, host in run.hosts.items() if run.groups[rank] == number)
        if len(set(counts.values())) > 1:
            spread = ", ".join(f"{count} on {host}" for host, count in counts.items())
            raise ValueError(f"{file}: ranks are spread unevenly ({spread}); run as many on every host")
        shapes.add((counts.total(), len(counts)))
    if len(shapes) > 1:
        said = ", ".join(f"{ranks} ranks on {hosts} host(s)" for ranks, hosts in sorted(shapes))
        raise ValueError(f"{file}: groups of different sizes ran at once ({said}); split the ranks evenly")
    ranks, hosts = shapes.pop()
    if ranks == 1:
        raise ValueError(f"{file}: one rank, between which nothing moves; run it on more GPUs")
    return ranks, hosts


def _measured(file: str, kind: str, ranks: int, hosts: int, runs: list[Run], skipped: tuple[str, ...]) -> Measured:
    notes = list(skipped)
    for run in runs:
        if run.missing and not run.ended:
            raise ValueError(
                f"{file}: the run broke off: {max(row.size for row in run.rows):.0f} bytes are its last result, "
                f"{run.sizes[0] if run.sizes else 0} were asked for"
            )
        if run.missing:
            notes.append(f"results end at {max(row.size for row in run.rows):.0f} bytes, before the largest asked for")
    rows = [row for run in runs for row in _chosen(file, run, notes)]
    if not rows:
        raise ValueError(f"{file}: no result lines")
    coarse = [row.size for row in rows if row.seconds is None]
    if any(run.cpu_time for run in runs):
        notes.append("the log reports CPU time (-C), so times are size over algbw")
    if coarse:
        notes.append(f"up to {max(coarse):.0f} bytes algbw is below {CPU_TIME_DIGITS} GB/s, too coarse: left out")
    points: dict[float, list[float]] = {}
    for row in rows:
        if row.seconds is not None:
            points.setdefault(row.size, []).append(row.seconds)
    if not points:
        raise ValueError(f"{file}: it reports CPU time (-C) and no bandwidth of {CPU_TIME_DIGITS} GB/s or more")
    repeats = max(len(times) for times in points.values())
    if repeats > 1:
        notes.append(f"medians of {repeats} cycles")
    parallel = {len(set(run.groups.values())) for run in runs} - {1}
    if parallel:
        notes.append(f"{max(parallel)} groups of {ranks} ranks ran at once")
    curve = TimeCurve.from_points((size, median(times)) for size, times in points.items())
    if kind == "send_recv":
        return Measured(kind, 2, min(2, hosts), curve, tuple(notes))
    return Measured(kind, ranks, hosts, curve, tuple(notes))


def _chosen(file: str, run: Run, notes: list[str]) -> list[Row]:
    """The rows of the operation and element type that training uses, in cycles of rising sizes, checked and right."""
    rows = [row for row in run.rows if row.size > 0]
    operations = list(dict.fromkeys(row.operation for row in rows))
    elements = list(dict.fromkeys(row.element for row in rows))
    operation = next((name for name in _OPERATIONS if name in operations), operations[0] if operations else "none")
    element = next((name for name in _TYPES if name in elements), elements[0] if elements else "float")
    if len(operations) * len(elements) > 1:
        notes.append(f"of {', '.join(operations)} in {', '.join(elements)}: {operation} in {element}")
    chosen = [row for row in rows if row.operation == operation and row.element == element]
    if rows and not chosen:
        raise ValueError(f"{file}: {operation} was measured, but not in {element}; give one operation and type")
    for row in chosen:
        if row.wrong > 0:
            raise ValueError(
                f"{file}, line {row.line}: {row.wrong:g} values came out wrong (#wrong): not a measurement"
            )
    if run.out_of_bounds and len(chosen) == len(rows):
        raise ValueError(f"{file}: 'Out of bounds values ... FAILED': results came out wrong, so it is no measurement")
    for before, row in pairwise(chosen):
        if row.size <= before.size and row.size != chosen[0].size:
            raise ValueError(
                f"{file}, line {row.line}: {row.size:.0f} bytes after {before.size:.0f}: neither a cycle of sizes nor "
                "a new one, as when several ranks print into one file; give every run a file of its own"
            )
    return chosen
