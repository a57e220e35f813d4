"""Logs of nccl-tests, in the shapes that people post: read right, or refused with the line that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.machine.nccl_tests import Measured, read_nccl_log, read_nccl_tests
from hp_plugin.planner.machine.placement import Placement

NCCL_TESTS = """\
# nThread 1 nGpus 1 minBytes 8 maxBytes 134217728 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1
#
# Using devices
#  Rank  0 Group  0 Pid  11111 on     node-a device  0 [0x18] NVIDIA H100 80GB HBM3
#  Rank  1 Group  0 Pid  11112 on     node-a device  1 [0x2a] NVIDIA H100 80GB HBM3
#  Rank  2 Group  0 Pid  22221 on     node-b device  0 [0x18] NVIDIA H100 80GB HBM3
#  Rank  3 Group  0 Pid  22222 on     node-b device  1 [0x2a] NVIDIA H100 80GB HBM3
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
     1048576        262144     float     sum      -1    50.00   20.97   31.46      0    49.00   21.40   32.10      0
    16777216       4194304     float     sum      -1   200.00   83.89  125.83      0   199.00   84.31  126.46      0
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 78.9
"""


def test_nccl_tests_output_becomes_a_curve(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("$ srun all_reduce_perf -b 1M -e 16M\n" + NCCL_TESTS)
    measured = read_nccl_tests(path)
    assert (measured.kind, measured.ranks, measured.nodes) == ("all_reduce", 4, 2)
    assert measured.curve.seconds(1048576) == pytest.approx(50e-6)
    assert measured.curve.seconds(16777216) == pytest.approx(200e-6)
    hardware = load_hardware("h100-ib")
    group = Placement(4, 2, 2)
    mine = hardware.with_curves({("all_reduce", 4, 2): measured.curve}, "log.txt")
    assert mine.collectives.seconds("all_reduce", 16777216, group) == pytest.approx(200e-6)
    assert mine.collectives.seconds("all_gather", 16777216, group) == hardware.collectives.seconds(
        "all_gather", 16777216, group
    )
    assert any("log.txt" in source for source in mine.sources)


def test_the_collective_can_be_named_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(NCCL_TESTS)
    assert read_nccl_tests(path, "reduce_scatter").kind == "reduce_scatter"
    assert read_nccl_tests(path, "alltoall").kind == "all_to_all"  # nccl-tests' own name
    with pytest.raises(ValueError, match="no program name such as all_reduce_perf"):
        read_nccl_tests(path)
    with pytest.raises(ValueError, match="unknown collective; choose from"):
        read_nccl_tests(path, "broadcast")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("  50.00   20.97", "  fifty   20.97", "line 12: size and time must be numbers, got '1048576' and 'fifty'"),
        (" 32.10      0\n", " 32.10\n", "line 12: expected 13 columns .* got 12"),
        ("  50.00   20.97", "   0.00   20.97", "line 12: size and time must be positive"),
        ("#  Rank ", "#  rank-", "no '#  Rank 0 ... on HOST device' line"),
    ],
)
def test_malformed_nccl_tests_lines_are_named(tmp_path: Path, before: str, after: str, said: str) -> None:
    path = tmp_path / "log.txt"
    assert before in NCCL_TESTS
    path.write_text(NCCL_TESTS.replace(before, after))
    with pytest.raises(ValueError, match=said):
        read_nccl_tests(path, "all_reduce")


@pytest.mark.parametrize("prefix", ["[1,0]<stdout>:", "[1,3]<stdout>: ", "0: ", "12: "])
def test_what_launchers_put_before_lines_is_ignored(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "log.txt"
    text = "# Collective test starting: all_reduce_perf_mpi\n" + NCCL_TESTS
    path.write_text("".join(f"{prefix}{line}\n" for line in text.splitlines()))
    measured = read_nccl_tests(path)
    assert (measured.kind, measured.ranks, measured.nodes, len(measured.curve.sizes)) == ("all_reduce", 4, 2, 2)


def test_other_versions_columns_and_lines(tmp_path: Path) -> None:
    """Timestamps behind the columns, no root column before 2.10, empty messages, host names that begin with digits."""
    path = tmp_path / "log.txt"
    stamped = NCCL_TESTS.replace("      0\n", "      0 2026-01-02 10:00:00\n")
    old = NCCL_TESTS.replace("    root  ", "  ").replace("      -1  ", "  ")
    empty = "     0     0     float     sum      -1" + "     0.20    0.00    0.00      0" * 2 + "\n"
    noisy = NCCL_TESTS.replace("# Out of", empty + "10.0.0.7 NCCL INFO ring 0\n# Out of")
    folder = "cd /data/my_perf_runs && ./all_reduce_perf -b 1M\n" + NCCL_TESTS + "srun: job all_reduce_perf finished\n"
    for text in (stamped, old, noisy, folder, NCCL_TESTS.replace("\n", "\r\n")):
        assert text != NCCL_TESTS
        path.write_bytes(text.encode())
        assert read_nccl_tests(path, "all_reduce").curve.seconds(16777216) == pytest.approx(200e-6)


def test_sendrecv_over_many_ranks_is_a_pairs_curve(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("sendrecv_perf\n" + NCCL_TESTS)
    measured = read_nccl_tests(path)
    assert (measured.kind, measured.ranks, measured.nodes) == ("send_recv", 2, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (NCCL_TESTS.replace("node-b device  1", "node-a device  2"), r"unevenly \(3 on node-a, 1 on node-b\)"),
        ("# Collective test starting: broadcast_perf\n" + NCCL_TESTS, "line 1: broadcast_perf is none of all_reduce"),
        ("all_gather_perf\n" + NCCL_TESTS, "the file says that it is all_gather"),
        (NCCL_TESTS.replace("  50.00", "    nan"), "line 12: size and time must be positive and finite"),
        ("\n".join(line for line in NCCL_TESTS.splitlines() if "Rank  " not in line or "Rank  0" in line), "one rank"),
    ],
)
def test_logs_that_are_no_one_run_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "log.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_nccl_tests(path, "all_reduce")


def test_empty_and_missing_nccl_tests_files(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("\n".join(line for line in NCCL_TESTS.splitlines() if line.startswith("#")))
    with pytest.raises(ValueError, match="no result lines"):
        read_nccl_tests(path, "all_reduce")
    with pytest.raises(ValueError, match="nccl-tests file"):
        read_nccl_tests(tmp_path / "nothing.txt", "all_reduce")


VERSION = "# nccl-tests version 2.17.6 nccl-headers=22807 nccl-library=22807\n"
SIZES = (1024, 65536, 16777216, 1073741824)


def micros(size: int, slower: float = 1.0) -> float:
    return slower * (20 + size / 3e5)


def row(size: int, element: str = "float", operation: str = "sum", slower: float = 1.0, wrong: str = "0") -> str:
    """A result line as nccl-tests 2.17 prints it."""
    time = micros(size, slower)
    algbw = size / time / 1e3
    body = f"  {time:7.2f}  {algbw:6.2f}  {algbw * 1.75:6.2f}  {wrong:>6}"
    return f"{size:12d}  {size // 4:12d}  {element:>8}  {operation:>6}  {-1:6d}{body}{body}\n"


def log(
    rows: str,
    program: str = "all_reduce_perf",
    ranks: int = 8,
    per_host: int = 8,
    largest: int = SIZES[-1],
    group: Callable[[int], int] = lambda rank: 0,
    time: str = "time",
    end: bool = True,
) -> str:
    """A whole run; `group` says a rank's group."""
    devices = "".join(
        f"#  Rank {r:2d} Group {group(r):2d} Pid {1000 + r:6d} on      node{r // per_host} device "
        f"{r % per_host:2d} [0000:0{r % per_host}:00] NVIDIA H100 80GB HBM3\n"
        for r in range(ranks)
    )
    unit = "(us)  (GB/s)  (GB/s)"
    text = (
        f"{VERSION}# Collective test starting: {program}\n"
        f"# nThread 1 nGpus 1 minBytes 1024 maxBytes {largest} step: 4(factor) warmup iters: 1 iters: 20 agg iters: 1 "
        f"validation: 1 graph: 0\n#\n# Using devices\n{devices}#\n"
        "#                                                              out-of-place                       in-place\n"
        f"#       size         count      type   redop    root  {time:>7}   algbw   busbw  #wrong  {time:>7}   algbw   "
        f"busbw  #wrong\n#        (B)    (elements)                               {unit}             {unit}\n{rows}"
    )
    ending = (
        f"# Out of bounds values : 0 OK\n# Avg bus bandwidth    : 123.4\n#\n# Collective test concluded: {program}\n"
    )
    return text + ending if end else text


ROWS = "".join(row(size) for size in SIZES)


def measured(tmp_path: Path, text: str) -> list[Measured]:
    path = tmp_path / "log.txt"
    path.write_text(text)
    return read_nccl_log(path)


def is_right(found: Measured, slower: float = 1.0) -> None:
    assert len(found.curve.sizes) == len(SIZES)
    for size in SIZES:
        assert found.curve.seconds(size) == pytest.approx(micros(size, slower) * 1e-6, rel=1e-3)


@pytest.mark.parametrize(
    "prefix",
    [
        "[0] ", "[1,0]<stdout>:", "[prterun-node1-77@1,0]<stdout>:", "[1,0]<stdout>: ", "0: ", "\t", "> ", '{"log":"',
        "Mon Mar  3 10:11:12 2025<stdout>:", "2025-03-03T10:11:12.123456789Z ", "2025-03-03T10:11:12Z stdout F ",
        "nccl-test-launcher-x7k2p: ", "worker-0 | ", "[pod/nccl-test-worker-0/nccl] ", "node1:  ", "10.0.0.7: ",
        "[2025-03-03 10:11:12,345] INFO - ", "\x1b[36m", "\x1b[1;32m[0] \x1b[0m",
    ],
)  # fmt: skip
def test_whatever_stands_before_a_line_is_stripped(tmp_path: Path, prefix: str) -> None:
    end = '\\n"}' if prefix.startswith("{") else "\x1b[0m" if "\x1b" in prefix else ""
    text = "".join(f"{prefix}{line}{end}\n" for line in log(ROWS, ranks=16).splitlines())
    (found,) = measured(tmp_path, text)
    assert (found.kind, found.ranks, found.nodes, found.notes) == ("all_reduce", 16, 2, ())
    is_right(found)


def test_cpu_time_is_not_taken_for_the_collectives_time(tmp_path: Path) -> None:
    """With -C the column is the launch's time; the bandwidths beside it are the collective's (nccl-tests common.cu)."""
    launch = ROWS.replace(f"{micros(SIZES[-1]):7.2f}", "   9.87")
    (found,) = measured(tmp_path, log(launch, time="cputime"))
    assert found.curve.seconds(SIZES[-1]) == pytest.approx(micros(SIZES[-1]) * 1e-6, rel=1e-3)
    assert found.curve.sizes == SIZES[1:]  # 0.05 GB/s says too little
    assert any("CPU time (-C)" in note for note in found.notes)
    assert any("up to 1024 bytes" in note for note in found.notes)
    with pytest.raises(ValueError, match="reports CPU time"):
        measured(tmp_path, log(row(1024), time="cputime", largest=1024))


def test_cycles_and_runs_are_joined_by_their_median(tmp_path: Path) -> None:
    cycles = "".join("".join(row(size, slower=slower) for size in SIZES) for slower in (1.0, 1.5, 1.1))
    (found,) = measured(tmp_path, log(cycles))
    is_right(found, 1.1)
    assert found.notes == ("medians of 3 cycles",)
    slow = "".join(row(size, slower=2.0) for size in SIZES)
    (found,) = measured(tmp_path, log(ROWS) + log(slow))
    is_right(found, 1.5)
    (found,) = measured(tmp_path, log(row(1024) + row(1024, slower=3.0), largest=1024))
    assert found.curve.seconds(1024) == pytest.approx(micros(1024, 2.0) * 1e-6, rel=1e-3)


def test_of_several_operations_and_types_training_uses_one(tmp_path: Path) -> None:
    by_size = "".join(row(s, op[0], op[1], slower) for s in SIZES for slower, op in OPERATIONS)
    by_operation = "".join(row(s, op[0], op[1], slower) for slower, op in OPERATIONS for s in SIZES)
    for rows in (by_size, by_operation):
        (found,) = measured(tmp_path, log(rows))
        is_right(found, 4.0)
        assert found.notes == ("of sum, prod, max in float, half, bfloat16: sum in bfloat16",)
    wrong_elsewhere = by_size.replace(row(1024, "float", "prod", 2.0), row(1024, "float", "prod", 2.0, wrong="12"))
    assert wrong_elsewhere != by_size
    is_right(measured(tmp_path, log(wrong_elsewhere))[0], 4.0)


OPERATIONS = [
    (1.0, ("float", "sum")), (2.0, ("float", "prod")), (3.0, ("half", "sum")), (4.0, ("bfloat16", "sum")),
    (5.0, ("bfloat16", "max")),
]  # fmt: skip


def test_every_collective_and_group_of_a_file_has_its_curve(tmp_path: Path) -> None:
    gathered = "".join(row(size, operation="none", slower=2.0) for size in SIZES)
    text = log(ROWS) + log(gathered, "all_gather_perf_mpi") + log(ROWS, "broadcast_perf") + log(ROWS, ranks=16)
    first, second, third = measured(tmp_path, text)
    assert [(each.kind, each.ranks) for each in (first, second, third)] == [
        ("all_reduce", 8),
        ("all_gather", 8),
        ("all_reduce", 16),
    ]
    is_right(first)
    is_right(second, 2.0)
    assert any("broadcast_perf is none of" in note for note in first.notes)
    path = tmp_path / "log.txt"
    assert [each.kind for each in read_nccl_log(path, "all_gather")] == ["all_gather"]
    with pytest.raises(ValueError, match="no run of reduce_scatter in it"):
        read_nccl_log(path, "reduce_scatter")
    with pytest.raises(ValueError, match="holds all_reduce on 8 ranks, all_gather on 8 ranks"):
        read_nccl_tests(path)


@pytest.mark.parametrize(
    ("group", "ranks", "nodes"),
    [
        (lambda rank: rank // 8, 8, 1), (lambda rank: rank % 8, 2, 2), (lambda rank: rank % 2, 8, 2),
        (lambda rank: rank // 2, 2, 1),
    ],
    ids=["DIV 8", "MOD 8", "MOD 2", "DIV 2"],
)  # fmt: skip
def test_split_runs_are_of_their_groups(tmp_path: Path, group: Callable[[int], int], ranks: int, nodes: int) -> None:
    """NCCL_TESTS_SPLIT: every group runs the operation on its own ranks (nccl-tests README)."""
    (found,) = measured(tmp_path, log(ROWS, ranks=16, group=group))
    assert (found.ranks, found.nodes) == (ranks, nodes)
    is_right(found)
    assert found.notes == (f"{16 // ranks} groups of {ranks} ranks ran at once",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            log(row(1024) + row(65536) + "node0: Test NCCL failure common.cu:958 'unhandled cuda error'\n", end=False),
            "line 20: the run failed: node0: Test NCCL failure",
        ),
        (log(row(1024) + "srun: error: node0: task 0: Killed\n", end=False), "the run failed: srun: error"),
        (log(row(1024) + row(65536), end=False), "broke off: 65536 bytes are its last result, 1073741824 were asked"),
        (log(row(1024) + row(65536, wrong="3") + row(SIZES[2])), "line 19: 3 values came out wrong"),
        (log(ROWS).replace("values : 0 OK", "values : 2 FAILED"), "results came out wrong"),
        (log("".join(row(size) * 2 for size in SIZES)), "65536 bytes after 65536: neither a cycle"),
        (log(ROWS).replace("#  Rank  5", "#  Rank  4"), "rank 4 is listed twice"),
        (log(ROWS).replace("#  Rank  5", "#  Line  5"), "rank 5 of 8 is not listed"),
        (log(ROWS, ranks=16, group=lambda rank: rank // 12), "groups of different sizes|spread unevenly"),
        (log("") + log(ROWS), "no result lines after rank 7 was listed"),
        ("\n".join(VERSION + line for line in log(ROWS, ranks=1).splitlines()), "one rank"),
        (
            "".join(f"0: {mine}\n1: {other}\n" for mine, other in zip(*[log(ROWS).splitlines()] * 2, strict=True)),
            "rank 0 is listed twice|no result lines",
        ),
        ("nothing of the kind\n", "neither a '#  Rank 0"),
    ],
)
def test_what_is_no_measurement_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        measured(tmp_path, text)


def test_a_run_cut_short_by_its_poster_says_where_it_ends(tmp_path: Path) -> None:
    (found,) = measured(tmp_path, log(row(1024) + row(65536)))
    assert found.notes == ("results end at 65536 bytes, before the largest asked for",)
    reduced = log(row(1024) + row(65536)).replace(
        "# Using", "# Reducing maxBytes to 100000 due to memory limitation\n# Using"
    )
    assert measured(tmp_path, reduced)[0].notes == ()


def test_unchecked_results_and_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    for raw in (log(ROWS).encode("utf-16"), log(ROWS).encode() + b"\xff\xfe\n", b"\xef\xbb\xbf" + log(ROWS).encode()):
        path.write_bytes(raw)
        is_right(read_nccl_tests(path))
    (found,) = measured(tmp_path, log("".join(row(size, wrong="N/A") for size in SIZES)))
    is_right(found)


def test_per_iteration_columns_are_followed(tmp_path: Path) -> None:
    """-I puts four columns behind each `#wrong`; the header says so."""
    more = "  1.00  9.00  8.00  3.00"
    body = row(1024).index("       0") + 8
    rows = "".join(f"{line[:body]}{more}{line[body:]}{more}\n" for line in ROWS.splitlines())
    text = log(rows).replace("#wrong", "#wrong  i_min  i_max  i_p99  i_cv%")
    is_right(measured(tmp_path, text)[0])
