"""`hp-plugin doctor`: what it concludes from what it finds, and how the command line ends."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hp_plugin.commands import doctor
from hp_plugin.commands import main as cli
from hp_plugin.commands.doctor import Facts, judge, render

ROOT = Path(__file__).parents[2]
VERSIONS = dict.fromkeys(doctor.PURPOSES) | {"python": "3.11.7", "torch": "2.13.0+cpu", "megatron-core": "0.16.1"}
CPU = Facts(VERSIONS, gloo=True)
GPU = Facts(VERSIONS | {"torch": "2.13.0"}, gpus=["H100"] * 8, cuda="13.0", nccl=True, gloo=True)


def lack(facts: Facts, want: str) -> str | None:
    return next(reason for what, reason in judge(facts).missing.items() if want in what)


def test_a_machine_without_cuda_trains_on_the_cpu() -> None:
    report = judge(CPU)
    assert report.backend == "cpu+gloo"
    assert report.reason == "this torch is built without CUDA"
    assert lack(CPU, "on GPUs") == report.reason
    assert lack(CPU, "on the CPU") is None


def test_gpus_come_first_and_the_cpu_backend_stays_out_of_their_way() -> None:
    report = judge(GPU)
    assert report.backend == "cuda+nccl"
    assert "8 CUDA device(s)" in report.reason
    assert "CUDA_VISIBLE_DEVICES=" in str(lack(GPU, "on the CPU"))


def test_a_cuda_build_without_a_device_falls_back_to_the_cpu() -> None:
    report = judge(replace(GPU, gpus=[]))
    assert (report.backend, report.reason) == ("cpu+gloo", "torch sees no CUDA device")


def test_gpus_without_nccl_train_nowhere() -> None:
    # The CPU backend refuses to run where torch sees CUDA devices, so gloo is no way out by itself.
    report = judge(replace(GPU, nccl=False))
    assert report.backend is None
    assert "without NCCL" in report.reason and "hide them" in report.reason


def test_neither_gloo_nor_gpus() -> None:
    report = judge(replace(CPU, gloo=False))
    assert report.backend is None
    assert "without gloo" in report.reason


@pytest.mark.parametrize("part", ["torch", "megatron-core"])
def test_a_missing_part_is_named(part: str) -> None:
    facts = replace(CPU, versions=VERSIONS | {part: None})
    report = judge(facts)
    assert report.backend is None
    assert f"{part}: not installed" in report.reason
    assert lack(facts, "plan") is None


def test_a_broken_part_says_why() -> None:
    report = judge(replace(CPU, broken={"torch": "OSError: libgomp.so.1: cannot open"}))
    assert report.backend is None
    assert "torch: cannot be imported (OSError: libgomp.so.1" in report.reason


def test_a_broken_transformer_engine_is_no_obstacle_to_other_layers() -> None:
    versions = GPU.versions | {"transformer-engine": "2.9.0"}
    facts = replace(GPU, versions=versions, broken={"transformer-engine": "ImportError: undefined symbol"})
    assert judge(facts).backend == "cuda+nccl"
    assert "undefined symbol" in str(lack(facts, "Transformer Engine"))
    assert lack(replace(facts, broken={}), "Transformer Engine") is None


def test_a_cpu_backend_that_does_not_fit_is_reported() -> None:
    report = judge(replace(CPU, cpu_backend="the CPU backend does not fit this Megatron-Core: RuntimeError: changed"))
    assert report.backend is None
    assert "changed" in report.reason


@pytest.mark.parametrize(
    ("version", "note", "trains"),
    [
        ("0.14.0", "0.14.0 is too old, >=0.15,<0.20 is needed", False),
        ("0.15.0", None, True),
        ("0.15.0rc4", None, True),
        ("0.19.9", None, True),
        ("0.20", "0.20 is newer than what is known to work, >=0.15,<0.20", True),
        ("1.0.0", "1.0.0 is newer than what is known to work, >=0.15,<0.20", True),
    ],
)
def test_megatron_core_is_held_against_the_known_range(version: str, note: str | None, trains: bool) -> None:
    report = judge(replace(CPU, versions=VERSIONS | {"megatron-core": version}))
    found = report.notes.get("megatron-core")
    assert (found.text if found else None) == note
    assert (report.backend is not None) is trains


def test_the_text_shows_every_part_and_every_purpose() -> None:
    report = judge(replace(CPU, versions=VERSIONS | {"megatron-core": "0.21.0"}))
    text = "\n".join(render(report))
    for word in [*doctor.PURPOSES, "2.13.0+cpu", *report.missing, "! megatron-core: 0.21.0 is newer"]:
        assert word in text
    assert text.endswith("Training will use cpu+gloo, because this torch is built without CUDA.")
    broken = "\n".join(render(judge(replace(CPU, versions=VERSIONS | {"torch": None}))))
    assert "Nothing can be trained here: torch: not installed." in broken


def test_the_text_says_what_was_run_on_the_installed_pair() -> None:
    tried, untried = (
        "\n".join(render(judge(replace(CPU, versions=VERSIONS | {"megatron-core": release}))))
        for release in ("0.16.1", "0.17.0")
    )
    assert "Megatron-Core 0.16.1 on Python 3.11.7: run: all tests" in tried
    assert "Megatron-Core 0.17.0 on Python 3.11.7: not tried" in untried


def command(*words: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """`hp-plugin WORDS` in an interpreter that has run `before`."""
    call = f"from hp_plugin.commands.main import main\nsys.exit(main({list(words)!r}))"
    code = f"import sys\n{textwrap.dedent(before)}\n{call}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


def test_without_torch_the_report_still_comes_and_the_status_is_1() -> None:
    done = command("doctor", before="sys.modules['torch'] = None")
    assert done.returncode == 1, done.stderr
    assert "torch: cannot be imported (ModuleNotFoundError" in done.stdout


@pytest.mark.parametrize(
    "error", [ValueError("m = 3\n  does not divide 4"), FileNotFoundError("no file"), ImportError("x")]
)
def test_a_mistake_is_one_line_and_status_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == f"hp-plugin: error: {' '.join(str(error).split())}\n"


@pytest.mark.parametrize("words", [[], ["docto"], ["doctor", "--yaml"], ["--wrong"]])
def test_an_unknown_command_or_option_is_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_names_every_command_and_loads_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    loaded = command("--version", before="import atexit; atexit.register(lambda: print(*sys.modules))").stdout
    assert "hp_plugin.commands.main" in loaded
    assert not any(module in loaded for module, _ in cli.COMMANDS.values())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: hp-plugin {name}" in capsys.readouterr().out


def test_ctrl_c_ends_quietly_with_130() -> None:
    code = """
        import sys, time
        from hp_plugin.commands import main as cli
        from hp_plugin.commands import doctor
        doctor.run = lambda args: print("ready", flush=True) or time.sleep(60)
        sys.exit(cli.main(["doctor"]))
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Programs that a shell starts in the background ignore the signal, and so would everything under them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == ""


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "import sys; from hp_plugin.commands import main, doctor; "
    code += "doctor.run = lambda args: print('line\\n' * 100_000) or 0; "
    code += "sys.exit(main.main(['doctor']))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=30) == 141
        assert process.stderr.read() == ""
