"""`hp-plugin plan` from the outside: no torch, tables on stdout, one line on stderr for what the user can mend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hp_plugin.commands.plan import main

SMALL = ["--model", "layers=4,D=512,h=8,g=2,vocab=1000", "--gpus", "4", "--global-batch", "8", "--seq", "256"]


def out(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*SMALL, *arguments]) == 0
    return capsys.readouterr().out


def test_it_runs_where_torch_is_not_installed() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'megatron', 'deepspeed', 'numpy', 'matplotlib'): sys.modules[name] = None\n"
        "import hp_plugin.planner\n"
        "from hp_plugin.commands import plan\n"
        "sys.exit(plan.main(['--validate']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "held out" in done.stdout


def test_without_matplotlib_nothing_is_written_and_it_is_said_what_to_install(tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "from hp_plugin.commands import plan\n"
        f"sys.exit(plan.main({[*SMALL, '--explain', 'tp=4,mbs=2', '--trace', str(trace), '--png', 'never.png']!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not trace.exists()
    assert done.stderr == "hp-plugin plan: drawing needs matplotlib: pip install matplotlib (or hp-plugin[plot])\n"


def test_logs_may_be_named_and_have_equal_signs_in_their_paths(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "a=b.txt"
    ranks = "".join(f"#  Rank  {r} Group  0 Pid 1 on   a device  {r} [0x18] NVIDIA H100\n" for r in range(4))
    log.write_text(f"{ranks}1048576 1 float sum -1 5000 0.21 0.31 0 5000 0.21 0.31 0\n")
    text = out(capsys, "--show-hardware", "--nccl-tests", f"alltoall={log}")
    assert "all_to_all, 4 ranks on 1 node(s)" in text and "a=b.txt" in text
    log.write_text("alltoall_perf\n" + log.read_text())
    assert "all_to_all, 4 ranks on 1 node(s)" in out(capsys, "--show-hardware", "--nccl-tests", str(log))


def test_sweeps_say_why_points_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, "--sweep", "seq", "--sweep-to", "2048", "--layouts", "tp=2,dp=2,mbs=2")
    assert "left out:\n" in text and "\n  seq 2048: tp=2,dp=2,mbs=2: global batch 1 is no multiple" in text


def test_the_table_names_layouts_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, "--top", "3")
    assert "4 × h100-ib" in text and "tokens/s" in text and "bottleneck" in text
    assert "--tensor-model-parallel-size" in text and "--head-dim-parallel" in text
    assert '"head_dim_parallel"' in text
    assert "layouts that cannot run" in text


def test_modes_and_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    assert "forward" in out(capsys, "--mode", "forward", "--top", "1")
    assert "decode" in out(capsys, "--mode", "decode", "--top", "1", "--continuous")
    refused = out(capsys, "--list-refused").splitlines()
    assert refused and all(": " in line for line in refused)


def test_hardware_with_sources(capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, "--show-hardware", "--hardware", "a100-ib")
    assert "[datasheet]" in text and "[assumed]" in text and "ROCm/xla@ad6eaee" in text


def test_own_measurements_change_the_prediction(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "gemm.csv"
    table.write_text("batch,m,n,k,tflops\n1,256,256,256,1\n")
    slow = out(capsys, "--explain", "tp=4,mbs=2", "--gemm-table", str(table))
    fast = out(capsys, "--explain", "tp=4,mbs=2")
    step = [float(text.splitlines()[1].split()[1]) for text in (slow, fast)]
    assert step[0] > 3 * step[1]
    log = tmp_path / "log.txt"
    ranks = "".join(f"#  Rank  {r} Group  0 Pid 1 on   a device  {r} [0x18] NVIDIA H100\n" for r in range(4))
    log.write_text(f"all_reduce_perf\n{ranks}1048576 1 float sum -1 5000 0.21 0.31 0 5000 0.21 0.31 0\n")
    slow = out(capsys, "--explain", "tp=4,mbs=2", "--nccl-tests", str(log))
    assert float(slow.splitlines()[1].split()[1]) > step[1]
    assert "log.txt" in out(capsys, "--show-hardware", "--nccl-tests", str(log))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hardware", "h1000"], "unknown hardware 'h1000'"),
        (["--model", "gpt9"], "unknown model 'gpt9'"),
        (["--explain", "tp=8"], "takes a multiple of tp·pp·cp = 8 GPUs, and 4 is none"),
        (["--explain", "grid=2x2,exchange=batch,mbs=1"], "needs a micro-batch size divisible by n"),
        (["--gpus", "0"], "--gpus must be positive, got 0"),
        (["--memory-gb", "-1"], "--memory-gb must be positive"),
        (["--trace", "t.json"], "name its layout with --explain"),
        (["--png", "t.png"], "add --explain or --sweep"),
        (["--layouts", "tp=4"], "--layouts goes with --sweep"),
        (["--gemm-table", "none.csv"], "--gemm-table none.csv: No such file"),
        (["--nccl-tests", "none.txt"], "nccl-tests file none.txt"),
        (["--continuous"], "continuous concerns decode"),
        (["--memory-gb", "nan"], "--memory-gb must be positive, got nan"),
        (["--validate", "--explain", "tp=4"], "--validate and --explain show different things"),
        (["--validate"], "--validate has its own models and machines and takes no --model or --gpus"),
        (["--tp", "0"], "--tp must be positive, got 0"),
        (["--tp", "3"], "--tp 3: no such size divides 4 GPUs"),
        (["--sweep", "gpus", "--list-refused"], "--sweep and --list-refused show different things"),
        (["--sweep", "gpus", "--layouts", "tp=2", "tp=2,dp=2"], "--layouts: one is given twice"),
        (["--sweep", "gpus", "--sweep-to", "2"], "--sweep-to 2 leaves no size to try"),
        (
            ["--explain", "tp=4,mbs=2", "--trace", "nowhere/t.json"],
            "--trace nowhere/t.json: name a file in a folder that",
        ),
        (["--explain", "tp=4,mbs=2", "--png", "."], "--png .: name a file in a folder that exists"),
        (["--model", "layers=4,D=512,h=8,layers=8"], "layers is given twice"),
        (["--model", "layers=99999999999999999999,D=512,h=8"], "models of up to 10000 are planned"),
        (
            ["--model", "gpt3-175b", "--seq", "4096", "--explain", "tp=4"],
            "4096 positions are more than the model's 2048",
        ),
        (["--mode", "decode", "--explain", "grid=2x2,exchange=scores,mbs=1"], "decode needs batch"),
        (["--memory-gb", "6.001"], "no layout of custom (0.0 B parameters) fits on 4 GPUs: the smallest needs"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main([*SMALL, *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.slow
def test_reproduce_paper_prints_both_models_and_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--reproduce", "paper"]) == 0
    text = capsys.readouterr().out
    for wanted in ("ratio 1.317", "ratio 1.353", "h100-nvlink", "really best", "decode: context", "the grid wins in"):
        assert wanted in text
