"""`hp-plugin compare`: what is refused, and one whole run with its counted bytes against the closed form."""

import json
from pathlib import Path

import pytest

from hp_plugin.bench.ranks import require_equal_losses
from hp_plugin.cli import main


def test_a_layout_with_another_loss_is_not_timed():
    require_equal_losses({"tp=2": [5.0, 4.0], "grid=1x2": [5.00001, 4.0]})
    with pytest.raises(ValueError, match=r"nothing was timed: grid=1x2 has loss \[5.0, 4.01\] where tp=2"):
        require_equal_losses({"tp=2": [5.0, 4.0], "grid=1x2": [5.0, 4.01]})
    with pytest.raises(ValueError, match="nothing was timed"):
        require_equal_losses({"tp=2": [5.0], "grid=1x2": [float("nan")]})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layouts", "tp=3"], "takes a multiple of tp·pp·cp = 3 GPUs, and 4 is none"),
        (["--layouts", "grid=4x1"], "m could be 1, 2"),
        (["--layouts", "tp=4", "tp=4"], "one is given twice"),
        (["--layouts", "tp=4", "--model", "huge"], "choose from tiny"),
        (["--layouts", "grid=2x2,exchange=local"], "another function"),
        (["--layouts", "tp=4", "--rounds", "0"], "--rounds must be positive, got 0"),
    ],
)
def test_bad_input_is_refused_before_ranks_start(options, said, tmp_path, capsys):
    arguments = ["compare", "--ranks", "4", "--model", "tiny-gqa", "--out", str(tmp_path / "out"), *options]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_stock_and_grid_side_by_side(tmp_path: Path, capsys):
    layouts = ["tp=2,mbs=2", "grid=1x2,mbs=2"]
    options = ["--ranks", "2", "--model", "tiny-gqa", "--steps", "1", "--rounds", "1", "--global-batch", "2"]
    assert main(["compare", *options, "--out", str(tmp_path), "--layouts", *layouts]) == 0
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["complete"] and list(report["layouts"]) == layouts
    stock, grid = report["layouts"].values()
    assert stock["losses"] == pytest.approx(grid["losses"], rel=1e-4)
    # Both all-to-alls of forward and of backward, and nothing else, pass over the dim group.
    assert grid["sent_bytes_per_token"]["dim/all_to_all"] == grid["dim_bytes_per_token_closed_form"] > 0
    assert not any(key.startswith("dim/") for key in stock["sent_bytes_per_token"])
    assert grid["tpot_ms"]["median"] > 0 and len(grid["samples"]) == 1
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in shown for name in layouts)
