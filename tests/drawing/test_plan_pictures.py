"""Pictures that `hp-plugin plan` draws."""

import json
from pathlib import Path

import pytest

from hp_plugin.commands.plan import main

SMALL = ["--model", "layers=4,D=512,h=8,g=2,vocab=1000", "--gpus", "4", "--global-batch", "8", "--seq", "256"]


def out(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*SMALL, *arguments]) == 0
    return capsys.readouterr().out


def test_explain_with_trace_and_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace, picture = tmp_path / "t.json", tmp_path / "t.png"
    pytest.importorskip("matplotlib")
    text = out(capsys, "--explain", "tp=2,pp=2,mbs=2", "--trace", str(trace), "--png", str(picture))
    assert "waiting for other stages" in text and "memory of the fullest rank" in text
    assert json.loads(trace.read_text())["traceEvents"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_sweep_table_and_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "s.png"
    text = out(
        capsys,
        "--sweep",
        "gpus",
        "--sweep-to",
        "1024",
        "--layouts",
        "tp=4,mbs=2",
        "grid=2x2,mbs=2",
        "--png",
        str(picture),
    )
    assert "1,024" in text and "[2] grid=2x2" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "[1] " in out(capsys, "--sweep", "micro-batches")


def test_the_map_is_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "m.png"
    text = out(capsys, "--global-batch", "512", "--map", str(picture))
    assert "2x2" in text and "1x4" in text and f"picture: {picture}" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
