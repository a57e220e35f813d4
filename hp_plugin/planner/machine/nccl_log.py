"""What nccl-tests printed, run by run: ranks, result rows, and how it ended.

Source: NVIDIA/nccl-tests `src/util.cu` and `src/common.cu`, 2.0 to 2.19. A line is known by its own form, wherever in
the text it stands: launchers, schedulers and containers put prefixes of many forms before it. The columns between
`redop` and `time` and after the second `#wrong` differ between versions, so the header line is followed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite

from hp_plugin.refusal import shown

NAMES = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "sendrecv": "send_recv",
}
"""Programs of nccl-tests, without `_perf`, and what they measure."""

_TERMINAL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[()][A-Z0-9]|[@-Z\\-_])")
"""Colours and cursor movements."""
_RANK = re.compile(r"#\s+Rank\s+(\d+)\b(.*?)\bon\s+(\S+)\s+device\b")
_GROUP = re.compile(r"\bGroup\s+(\d+)\b")
_SIZES = re.compile(r"#\s*nThread\s.*?minBytes\s+(\d+)\s+maxBytes\s+(\d+)\s+step:\s*(\d+)\s*\((\w+)\)")
_REDUCED = re.compile(r"Reducing maxBytes to (\d+)")
_PROGRAM = re.compile(r"\b([a-z_]+)_perf(?![a-z])")
_ROW = re.compile(r"(?<!\d)\d+\s+\d+\s+(?:u?int(?:8|32|64)?|char|half|float|double|bfloat16|f(?:loat|p)?8\w+)\s+\S")
_FAILURE = re.compile(
    r"Test (?:NCCL|CUDA) failure|Test failure|Test timeout|Segmentation fault|MPI_ABORT|exited on signal|"
    r"BAD TERMINATION|DUE TO TIME LIMIT|srun: error|CANCELLED AT"
)
_HEADER = ["size", "count", "type", "redop", "root", *("time", "algbw", "busbw", "#wrong") * 2]
"""Columns where no header says otherwise."""
AGREES_FROM = 0.1
"""GB/s from which a bandwidth, printed to 0.01, has to agree with size over time to a tenth."""
CPU_TIME_DIGITS = 0.1
"""GB/s below which a bandwidth, printed to 0.01, is too coarse to compute a time from."""


@dataclass(frozen=True)
class Row:
    """One result line, out of place: bytes, seconds (None: too coarse), element type, operation, wrong values."""

    line: int
    size: float
    seconds: float | None
    element: str
    operation: str
    wrong: float


@dataclass
class Run:
    """What has been read of one run of one program; `hosts` and `groups` by rank."""

    kind: str | None = None
    not_needed: str | None = None
    """Why its program is none that a layout needs, if so."""
    hosts: dict[int, str] = field(default_factory=dict)
    groups: dict[int, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    header: list[str] = field(default_factory=lambda: _HEADER)
    sizes: tuple[int, int, bool] | None = None
    """Largest size asked for, step, and whether the step is a factor."""
    failure: str | None = None
    ended: bool = False
    out_of_bounds: bool = False

    @property
    def started(self) -> bool:
        """Whether results or the end of the run have been seen, after which another run may begin."""
        return bool(self.rows) or self.ended

    @property
    def cpu_time(self) -> bool:
        """Whether the time column is that of the launch (`-C`), not of the collective."""
        return "cputime" in self.header

    @property
    def missing(self) -> bool:
        """Whether sizes that the run set out to measure are not in its results."""
        if self.sizes is None or not self.rows:
            return False
        largest, step, factor = self.sizes
        reached = max(row.size for row in self.rows)
        # Sizes are rounded down to what divides over the ranks: one step is not missed by that.
        return reached * step <= largest if factor and step > 1 else reached + 2 * step <= largest


def read_runs(lines: Iterable[str], file: str) -> list[Run]:
    """The runs of a log in order; `file` names it in messages.

    Raises:
        ValueError: a malformed line, or a rank that is listed twice in one run.
    """
    runs = [Run()]
    for number, line in enumerate(lines, start=1):
        _take(runs, f"{file}, line {number}", number, _TERMINAL.sub("", line))
    return [run for run in runs if run.rows or run.hosts or run.failure]


def _take(runs: list[Run], where: str, number: int, text: str) -> None:
    """One line into the run that is being read, or into a new one."""
    starting = "Collective test starting" in text
    rank, sizes = _RANK.search(text), _SIZES.search(text)
    if (runs[-1].started and (starting or rank or sizes)) or (runs[-1].hosts and (starting or sizes)):
        # Without a line of its own a run's program is the one named last, as in the command before it.
        runs.append(Run(kind=runs[-1].kind))
    run = runs[-1]
    _name_program(run, where, text, starting)
    if rank:
        _take_rank(run, where, rank)
    elif sizes:
        run.sizes = (int(sizes[2]), int(sizes[3]), sizes[4] == "factor")
    elif reduced := _REDUCED.search(text):
        run.sizes = (int(reduced[1]), *run.sizes[1:]) if run.sizes else None
    elif row := _ROW.search(text):
        run.rows.append(_row(where, number, text[row.start() :].split(), run))
    elif "#" in text and {"size", "count", "busbw"} <= set(text.split()):
        run.header = _columns(where, text)
    elif "Out of bounds values" in text:
        run.out_of_bounds = "FAILED" in text
    elif "Avg bus bandwidth" in text or "Collective test concluded" in text:
        run.ended = True
    elif _FAILURE.search(text) and not run.ended and run.failure is None:
        run.failure = f"{where}: the run failed: {text.strip()[:120]}"


def _columns(where: str, text: str) -> list[str]:
    """Columns of a header, in the order that nccl-tests has them in every version."""
    words = text.split()
    start = min(at for at, word in enumerate(words) if word in ("size", "count", "type"))
    header = words[start:]
    time = next((at for at, word in enumerate(header) if word in ("time", "cputime")), None)
    if header[:3] != ["size", "count", "type"] or (time and header[time + 1 : time + 3] != ["algbw", "busbw"]):
        said = shown(" ".join(header))
        raise ValueError(f"{where}: columns in another order than nccl-tests prints: {said}")
    return header


def _name_program(run: Run, where: str, text: str, starting: bool) -> None:
    programs = _PROGRAM.findall(text)
    known = [name for name in programs if name in NAMES]
    if "Collective test concluded" in text:
        return
    if known and not (run.rows and not run.ended):
        # The command itself may stand in a folder or behind a wrapper of a like name.
        run.kind = NAMES[known[-1]] if not run.rows else run.kind
    elif programs and starting:
        run.kind = None
        run.not_needed = f"{where}: {programs[-1]}_perf is none of {', '.join(NAMES)}, which a layout needs"


def _take_rank(run: Run, where: str, found: re.Match[str]) -> None:
    rank, group = int(found[1]), _GROUP.search(found[2])
    if rank in run.hosts:
        raise ValueError(
            f"{where}: rank {rank} is listed twice: several processes print into this file, each as a run of its own "
            "(nccl-tests built without MPI=1?), or outputs are mixed"
        )
    run.hosts[rank] = found[3]
    run.groups[rank] = int(group[1]) if group else 0


def _row(where: str, number: int, words: list[str], run: Run) -> Row:
    header = run.header
    if len(words) < len(header):
        raise ValueError(f"{where}: expected {len(header)} columns ({' '.join(header)}), got {len(words)}")
    time_column = next((at for at, word in enumerate(header) if word in ("time", "cputime")), None)
    if time_column is None:
        raise ValueError(f"{where}: no column `time` in the header ({' '.join(header)})")
    try:
        size, micros = float(words[0]), float(words[time_column])
        bandwidth = float(words[time_column + 1])
    except ValueError:
        raise ValueError(
            f"{where}: size and time must be numbers, got {shown(words[0])} and {shown(words[time_column])}"
        ) from None
    if size > 0 and not (micros > 0 and isfinite(micros)):
        raise ValueError(f"{where}: size and time must be positive and finite, got {size:g}, {micros:g}")
    if not run.cpu_time and bandwidth >= AGREES_FROM and abs(size / (micros * 1e3) / bandwidth - 1) > 0.1:
        raise ValueError(
            f"{where}: {size:g} bytes in {micros:g} µs are not algbw {bandwidth:g} GB/s: columns that are shifted or "
            "in another order than the header's"
        )
    seconds: float | None = micros * 1e-6
    if run.cpu_time:
        # The bandwidths are the collective's own; the column says how long its launch took.
        seconds = size / (bandwidth * 1e9) if bandwidth >= CPU_TIME_DIGITS else None
    return Row(number, size, seconds, words[2], _operation(words, header), _wrong(words, header))


def _operation(words: list[str], header: list[str]) -> str:
    return words[header.index("redop")] if "redop" in header else "none"


def _wrong(words: list[str], header: list[str]) -> float:
    """Values that a check found wrong; `N/A` where nothing was checked. Versions before 2.11 print a difference."""
    column = next((at for at, word in enumerate(header) if word in ("#wrong", "wrong")), None)
    if column is None:
        return 0.0
    try:
        return float(words[column])
    except ValueError:
        return 0.0
