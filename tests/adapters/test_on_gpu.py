"""`tools/on_gpu.sh` as far as a machine without a GPU goes: its stages, its machine file, its page, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hp_plugin.bench.gpu.page import markdown
from hp_plugin.bench.gpu.stages import _outcomes, all_stages, main
from hp_plugin.commands.main import main as command
from hp_plugin.planner.machine.hardware import load_hardware

ROOT = Path(__file__).parents[2]
LOG = """
============================= test session starts ==============================
tests/gpu/test_layers.py::test_output_and_every_gradient[batch-2x2] PASSED [  1%]
tests/gpu/test_layers.py::test_output_and_every_gradient[scores-2x2] FAILED [  3%]
tests/gpu/test_trainer.py::test_losses_of_one_rank[fused core] SKIPPED (needs a CUDA device) [  4%]
tests/gpu/test_trainer.py::test_losses_of_one_rank[batch] ERROR [  6%]
tests/gpu/test_trainer.py::test_losses_of_one_rank[weights, SP]"""


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("shard")
    words = ["-W", "ignore", "-m", "hp_plugin.bench.gpu.shard", "result.json", "machine.json", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], cwd=folder, env=environment, check=True, timeout=300)
    return json.loads((folder / "result.json").read_text("utf-8")), folder / "machine.json"


def test_every_layout_of_the_sources_models_is_replayed(shard: tuple[dict[str, Any], Path]) -> None:
    result, _ = shard
    for rows in result["rows"].values():
        ran = [row for row in rows if "measured_s" in row]
        assert len(rows) == 2 + 4 * 4 and len(ran) >= 14, [row for row in rows if row not in ran]
        assert {row["layout"].split(",")[0] for row in ran} >= {"tp=8", "tp=16", "grid=8x2", "grid=4x4", "grid=1x16"}
        for row in ran:
            for one in ("forward", "backward"):
                kinds = {"products", "memory"} | ({"attention"} if "exchange=scores" not in row["layout"] else set())
                assert row["measured_s"][one].keys() == kinds
                assert min(row["measured_s"][one].values()) >= 0 < row["planned_s"]["this device"][one]


def test_the_machine_file_is_the_planners(
    shard: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = shard
    machine = load_hardware(str(path))
    assert machine.parameters["hbm_bytes_per_s"].kind == "here" and machine.domain == load_hardware("h100-ib").domain
    assert machine.attention_kernel(True).head_dims.training >= 512
    assert command(["plan", "--hardware", str(path), "--model", "paper-dense", "--gpus", "16", "--seq", "512"]) == 0
    assert "grid=" in capsys.readouterr().out


def test_the_page_shows_every_stage(shard: tuple[dict[str, Any], Path]) -> None:
    result, _ = shard
    ended = {"seconds": 1.0, "status": 0, "log": "x.log"}
    times = {
        f"{mode}/{core}": [0.002, 0.001, 0.003] for mode in ("forward", "training") for core in ("unfused", "fused")
    }
    shape = dict(seq_length=8, micro_batch_size=1, num_attention_heads=2, num_query_groups=1, kv_channels=512, window=3)
    heads = {"shape": shape | {"dtype": "bf16"}, "times_s": times, "peak_bytes": dict.fromkeys(times, 2**20)}
    stages: dict[str, Any] = {
        "wide heads": {**ended, "found": {"wide": heads}},
        "one rank": {**ended, "found": {"one rank": {"losses": [5.0, 4.5], "peak_bytes": 2**21}}},
        "four ranks": {**ended, "found": {"tp=4": {"losses": [5.0, 4.5001], "peak_bytes": None}}},
        "shard": {**ended, "found": result},
        "tests": {**ended, "status": None, "found": _outcomes(LOG)},
    }
    page = markdown({"device": "Card X", "dry_run": False, "system": "s", "versions": {"torch": "2"}, "stages": stages})
    for line in (
        "# Card X",
        "| tests | cut off, x.log | 1 |",
        "| wide: s=8 h=2 g=1 d=512, window 3, bf16 | forward | 2.00 | 2.00 | 1.00 | 1 | 1 |",
        "| tp=4 | 5.000000, 4.500100 | 1.0e-04 | - |",
        "1 passed, 1 failed, 1 error, 1 skipped.",
        "* tests/gpu/test_layers.py::test_output_and_every_gradient[scores-2x2]",
    ):
        assert line in page.splitlines(), page
    assert "grid=4x4,exchange=batch" in page and "predicts for 16 GPUs" in page and "None" not in page


def test_all_stages_are_done_in_eight_minutes(tmp_path: Path) -> None:
    assert sum(stage.limit_s for stage in all_stages(tmp_path, dry_run=False)) <= 8 * 60
    names = [stage.name for stage in all_stages(tmp_path, dry_run=True)]
    assert names == [stage.name for stage in all_stages(tmp_path, dry_run=False)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["stages", "--out", str(tmp_path / "out")])
    assert main() == 2 and not (tmp_path / "out").exists()
    assert "torch sees no CUDA device; --dry-run goes through all stages without" in capsys.readouterr().err


def test_the_script_names_what_is_wrong() -> None:
    for words, said in ((["--speed"], "unknown option --speed"), (["--python", "/bin/false"], "has no torch")):
        done = subprocess.run(["bash", "tools/on_gpu.sh", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr
