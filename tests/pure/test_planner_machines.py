"""Machines are data: one file each, listed in order, every figure with its kind and source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hp_plugin.commands import plan as plan_cli
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine import description
from hp_plugin.planner.machine.hardware import load_hardware, shipped
from hp_plugin.planner.machine.json_file import package_json
from hp_plugin.planner.machine.placement import Placement
from hp_plugin.planner.seconds.step import predict

FOLDER = Path(description.__file__).parent / "data" / "machines"


def test_every_file_is_a_machine_and_they_are_listed_in_order() -> None:
    assert set(shipped()) == {path.stem for path in FOLDER.glob("*.json")}
    # A further machine is listed behind these.
    assert list(shipped())[:5] == ["h100-ib", "h100-nvlink", "h200-ib", "a100-ib", "gb200-nvl72"]
    orders = [json.loads((FOLDER / f"{name}.json").read_text())["order"] for name in shipped()]
    assert orders == sorted(set(orders))


def test_adding_a_machine_is_adding_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A file more in the folder: `--show-hardware` knows it, and it is listed last."""
    mine: dict[str, Any] = {
        "based_on": "h200-ib",
        "description": "ours",
        "parameters": {"domain": {"value": 4, "kind": "user", "source": "four GPUs to a node"}},
    }
    folder = description.package_folder(description._FOLDER)
    monkeypatch.setattr(description, "package_folder", lambda name: [*folder, "b9-ours.json"])
    monkeypatch.setattr(
        description, "package_json", lambda name: mine if name.endswith("b9-ours.json") else package_json(name)
    )
    description.shipped_entries.cache_clear()
    try:
        assert list(shipped())[-1] == "b9-ours"
        assert plan_cli.main(["--hardware", "b9-ours", "--show-hardware"]) == 0
        said = capsys.readouterr().out
        assert "domain = 4  [user]" in said and "memory_bytes = 1.41e+11  [datasheet]" in said
    finally:
        load_hardware.cache_clear()
        description.shipped_entries.cache_clear()


def test_gb200_is_one_domain_of_72_with_the_measured_all_reduce() -> None:
    """coreweave/nccl-tests pull request 43: 8 GiB over 72 GPUs in 20.3 ms, 1 GiB in 3.1 ms."""
    machine = load_hardware("gb200-nvl72")
    assert machine.domain == 72
    rack = Placement(72, 1, 72)
    assert machine.collectives.seconds("all_reduce", 2.0**33, rack) == pytest.approx(20.3e-3, rel=0.02)
    assert machine.collectives.seconds("all_reduce", 2.0**30, rack) == pytest.approx(3.1e-3, rel=0.15)
    kinds = {name: parameter.kind for name, parameter in machine.parameters.items()}
    assert {name for name, kind in kinds.items() if kind == "datasheet"} >= {"memory_bytes", "peak_flops", "gemm_scale"}


@pytest.mark.parametrize("name", ["gb200-nvl72", "h100-nvlink"])
def test_sixteen_ranks_of_tensor_parallelism_stay_in_one_domain(name: str) -> None:
    model, layout, workload = load_model("llama3-8b"), Layout.parse("grid=8x2,mbs=4"), Workload("train", 4096, 64)
    inside = predict(model, layout, workload, load_hardware(name))
    across = predict(model, layout, workload, load_hardware("h100-ib"))
    assert inside.tpot < across.tpot


def test_a_machine_may_say_that_few_tiles_cost_nothing() -> None:
    shape = {"tile_rows": 1, "half_waves": 0.0, "reference_waves": 1.0}
    assert description.attention_kernels({"occupancy": shape, "kernels": {}}, 4) == {}
    with pytest.raises(ValueError, match="half_waves must be a positive number"):
        description.attention_kernels({"occupancy": shape | {"half_waves": -1.0}, "kernels": {}}, 4)
