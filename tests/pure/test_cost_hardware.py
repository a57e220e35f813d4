"""Machines: every figure has a source, and a malformed description names its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hp_plugin.cost.hardware import PARAMETERS, load_hardware, package_json, shipped
from hp_plugin.cost.nccl_tests import read_nccl_tests
from hp_plugin.cost.parameter import KINDS
from hp_plugin.cost.placement import Placement


@pytest.mark.parametrize("name", list(shipped()))
def test_every_figure_has_a_kind_and_a_source(name: str) -> None:
    hardware = load_hardware(name)
    assert set(hardware.parameters) == set(PARAMETERS)
    for field, parameter in hardware.parameters.items():
        assert parameter.kind in KINDS, field
        assert len(parameter.source) > 10, field
    assert len(hardware.sources) >= 10


def test_calibration_fits_one_number_and_says_so() -> None:
    kinds = {field: parameter.kind for field, parameter in load_hardware("h100-ib").parameters.items()}
    assert [field for field, kind in kinds.items() if kind == "calibrated"] == ["gemm_efficiency"]


def test_machines_differ_where_they_should() -> None:
    h100, h200, a100 = (load_hardware(name) for name in ("h100-ib", "h200-ib", "a100-ib"))
    assert h200["memory_bytes"] > h100["memory_bytes"] and h200.gemm is not a100.gemm
    assert a100.kernels == ("fa2",) and a100["gemm_scale"] < 0.4
    group = Placement(8, 1, 8)
    size = 2.0**30
    ratio = a100.collectives.seconds("all_gather", size, group) / h100.collectives.seconds("all_gather", size, group)
    assert ratio == pytest.approx(1.5, rel=0.02)  # NVLink 3 against NVLink 4


def test_package_tables_name_their_sources() -> None:
    for entry in package_json("collectives_h100.json")["curves"]:
        assert entry["kind"] in KINDS and len(entry["source"]) > 10
    for name, entry in package_json("attention_h100.json")["kernels"].items():
        assert entry["kind"] in KINDS and "@" in entry["source"], name
    assert "@" in package_json("gemm_h100.json")["source"]
    for table in package_json("published.json").values():
        assert len(table["source"]) > 10


def test_a_users_machine_inherits_what_it_does_not_say(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    mine = {"value": 40e9, "kind": "user", "source": "our nodes have half of the memory"}
    path.write_text(json.dumps({"based_on": "h100-ib", "parameters": {"memory_bytes": mine}}))
    hardware = load_hardware(str(path))
    assert hardware["memory_bytes"] == 40e9
    assert hardware["peak_flops"] == load_hardware("h100-ib")["peak_flops"]


def test_a_machine_described_from_nothing(tmp_path: Path) -> None:
    """A two-rank machine with its own tables, in the shipped form."""
    figure = {"value": 1.0, "kind": "user", "source": "measured by ourselves"}
    curves = [
        {"collective": kind, "ranks": 2, "nodes": 1, "kind": "user", "source": "s", "points": [[1, 10.0], [1001, 20.0]]}
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
    ]
    entry: dict[str, Any] = {
        "description": "ours",
        "parameters": {field: figure for field in PARAMETERS},
        "gemm": {"kind": "user", "source": "s", "rows": [[1, 256, 256, 256, 0.5]]},
        "attention": "attention_h100.json",
        "kernels": ["fa2"],
        "collectives": {"curves": curves},
    }
    path = tmp_path / "ours.json"
    path.write_text(json.dumps(entry))
    hardware = load_hardware(str(path))
    assert hardware.collectives.seconds("all_gather", 501, Placement(2, 1, 2)) == pytest.approx(15e-6)
    assert hardware.gemm.rate(1, 512, 512, 512) == pytest.approx(0.5e12)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"based_on": "h900"}, "based_on 'h900' is none of"),
        ({"based_on": "h100-ib", "nodes": 2}, "unknown field 'nodes'"),
        ({"parameters": {}}, "missing memory_bytes"),
        ({"based_on": "h100-ib", "parameters": {"hbm": 3}}, "unknown parameter 'hbm'"),
        ({"based_on": "h100-ib", "parameters": {"peak_flops": 3}}, "peak_flops: expected an object"),
        (
            {"based_on": "h100-ib", "parameters": {"peak_flops": {"value": 3, "kind": "user"}}},
            "peak_flops: missing source",
        ),
        (
            {"based_on": "h100-ib", "parameters": {"peak_flops": {"value": -3, "kind": "user", "source": "s"}}},
            "peak_flops: value must be a positive number, got -3",
        ),
        (
            {"based_on": "h100-ib", "parameters": {"peak_flops": {"value": 3, "kind": "guess", "source": "s"}}},
            "kind 'guess' is none of",
        ),
        ({"based_on": "h100-ib", "collectives": {"curves": [{"ranks": 2}]}}, "malformed table, KeyError"),
        ({"based_on": "h100-ib", "kernels": ["fa9"]}, "'fa9' is not in the attention table"),
        ([1, 2], "expected one JSON object"),
    ],
)
def test_malformed_machines_name_the_field(tmp_path: Path, entry: object, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=said):
        load_hardware(str(path))


def test_unknown_machines_are_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match=r"unknown hardware 'h100-bi'.*did you mean h100-ib"):
        load_hardware("h100-bi")
    with pytest.raises(ValueError, match=r"hardware file missing\.json: No such file"):
        load_hardware("missing.json")


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
        ("\n    16777216 ", "\n     1048576 ", "occur twice"),
    ],
)
def test_malformed_nccl_tests_lines_are_named(tmp_path: Path, before: str, after: str, said: str) -> None:
    path = tmp_path / "log.txt"
    assert before in NCCL_TESTS
    path.write_text(NCCL_TESTS.replace(before, after))
    with pytest.raises(ValueError, match=said):
        read_nccl_tests(path, "all_reduce")


def test_empty_and_missing_nccl_tests_files(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("\n".join(line for line in NCCL_TESTS.splitlines() if line.startswith("#")))
    with pytest.raises(ValueError, match="no result lines"):
        read_nccl_tests(path, "all_reduce")
    with pytest.raises(ValueError, match="nccl-tests file"):
        read_nccl_tests(tmp_path / "nothing.txt", "all_reduce")
