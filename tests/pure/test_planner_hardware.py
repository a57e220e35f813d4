"""Machines: every figure has a source, and a malformed description names its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.machine.curve import TimeCurve
from hp_plugin.planner.machine.hardware import load_hardware, shipped
from hp_plugin.planner.machine.json_file import package_json
from hp_plugin.planner.machine.parameter import KINDS, PARAMETERS
from hp_plugin.planner.machine.placement import Placement


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
    for entry in package_json("machine/data/collectives_h100.json")["curves"]:
        assert entry["kind"] in KINDS and len(entry["source"]) > 10
    for name, entry in package_json("machine/data/attention_h100.json")["kernels"].items():
        assert entry["kind"] in KINDS and "@" in entry["source"], name
    assert "@" in package_json("machine/data/gemm_h100.json")["source"]
    for table in package_json("reports/data/published.json").values():
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
        "parameters": {field: figure for field in PARAMETERS} | {"multiprocessors": {**figure, "value": 2}},
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


def machine_with(field: str, value: float) -> dict[str, Any]:
    return {"based_on": "h100-ib", "parameters": {field: {"value": value, "kind": "user", "source": "s"}}}


def test_another_network_changes_what_crosses_it(tmp_path: Path) -> None:
    """Half of the network bandwidth: measured curves over two nodes and messages between nodes slow down with it."""
    path = tmp_path / "slow.json"
    path.write_text(json.dumps(machine_with("nic_bytes_per_s", 46.56e9 / 2)))
    slow, fast = load_hardware(str(path)).collectives, load_hardware("h100-ib").collectives
    for kind, group in (
        ("all_reduce", Placement(16, 2, 8)), ("all_to_all", Placement(16, 2, 8)), ("send_recv", Placement(2, 2, 1)),
        ("all_gather", Placement(32, 4, 8)),
    ):  # fmt: skip
        assert slow.seconds(kind, 2.0**30, group) / fast.seconds(kind, 2.0**30, group) == pytest.approx(2, rel=0.1), (
            kind
        )
        assert slow.seconds(kind, 8, group) == pytest.approx(fast.seconds(kind, 8, group)), kind
    inside = Placement(8, 1, 8)
    assert slow.seconds("all_reduce", 2.0**30, inside) == fast.seconds("all_reduce", 2.0**30, inside)


def test_a_measured_group_speaks_for_larger_ones() -> None:
    """A slow all-reduce over 64 ranks in 8 nodes: 128 ranks in 16 nodes are not predicted faster."""
    slow = TimeCurve.from_points([(1e6, 1e-3), (67e6, 14e-3)])
    mine = load_hardware("h100-ib").with_curves({("all_reduce", 64, 8): slow}, "ours").collectives
    assert mine.seconds("all_reduce", 67e6, Placement(128, 16, 8)) >= 14e-3
    stock = load_hardware("h100-ib").collectives
    assert mine.seconds("all_reduce", 67e6, Placement(16, 2, 8)) == stock.seconds(
        "all_reduce", 67e6, Placement(16, 2, 8)
    )


def test_files_that_are_no_description_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    for content, said in (
        (b'{"a": 1, "a": 2}', "m.json: 'a' is given twice"),
        (b"\xff\xfe", "m.json: not UTF-8 text"),
        (b"[" * 100_000, "m.json: the JSON is nested too deeply"),
        (b'{"a": ', "m.json, line 1: not JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            load_hardware(str(path))
        with pytest.raises(ValueError, match=said):
            load_model(str(path))
        load_hardware.cache_clear()


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
        ({"based_on": "h100-ib", "parameters": []}, "parameters: expected an object, got"),
        ({"based_on": ["h100-ib"]}, "based_on .* is none of"),
        ({"based_on": "h100-ib", "kernels": "cudnn"}, "kernels: expected a list of names, got 'cudnn'"),
        ({"based_on": "h100-ib", "gemm": "no.json"}, "no gemm table 'no.json', neither beside"),
        (machine_with("domain", 7.5), "domain: must be a whole number, got 7.5"),
        (machine_with("gemm_efficiency", 5), "gemm_efficiency: a share is at most 1, got 5"),
        (machine_with("nic_bytes_per_s", float("inf")), "'Infinity' is no finite number"),
        (machine_with("nic_bytes_per_s", float("nan")), "'NaN' is no finite number"),
        (machine_with("collective_multiprocessors", 132), "132 of 132 multiprocessors leave none for kernels"),
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
