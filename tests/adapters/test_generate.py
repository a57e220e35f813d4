"""`hp-plugin generate` and examples/generate.py as commands: what they show, refuse, and leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hp_plugin.commands import main as cli
from tests.adapters.test_checkpoint_resume import train_saving
from tests.ranks import Ranks

ROOT = Path(__file__).parents[2]
GENERATE = [sys.executable, "-m", "hp_plugin.commands.main", "generate"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*load_state_dict. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*we are deprecating ShardedTensor:FutureWarning"),
]


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the trainer's, of one rank, that has seen a few lines of Python."""
    folder = tmp_path_factory.mktemp("generate")
    ranks.run(1, train_saving, str(folder), f"--train-iters 30 --lr 1e-2 --save {folder / 'saved'}")
    return str(folder / "saved")


def generated(words: list[str], text: str = "") -> tuple[str, str]:
    done = subprocess.run([*GENERATE, *words], input=text, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_one_rank_and_a_grid_show_the_same_text_and_how_fast_it_came(saved: str) -> None:
    words = [
        "--load",
        saved,
        "--prompt",
        "def ",
        "x = ",
        "--max-new-tokens",
        "12",
        "--temperature",
        "0.9",
        "--seed",
        "4",
    ]
    alone, said = generated(words)
    assert alone.startswith("== 1 of 2\ndef ") and "\n== 2 of 2\nx = " in alone and len(alone) > 50
    assert "24 tokens in" in said and "tokens/s; prompts" in said and "ms per output token (TPOT)" in said
    on_grid, said = generated([*words, "--head-dim-parallel", "1,2"])
    assert on_grid == alone
    assert "Warning" not in said, "ranks say on import which packages Megatron-Core does without"
    assert generated(["--load", saved, "--max-new-tokens", "3"], "import os")[0].startswith("import os")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", ""], "prompt 1 is empty"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--prompt", "a", "--head-dim-parallel", "3,1"], "m=3 must divide"),
        (["--prompt", "a", "--head-dim-parallel", "2,2", "--tensor-model-parallel-size", "2"], "contradicts"),
        (["--prompt", "a", "--head-dim-parallel", "2,2", "--head-dim-exchange", "batch"], "1 % 2 = 1"),
        (["--prompt", "a", "--head-dim-parallel", "2,2", "--head-dim-exchange", "scores"], "has no key/value cache"),
        (["--prompt", "a", "--tensor-model-parallel-size", "3"], "must be a multiple of tensor_model_parallel_size"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature must be at least 0"),
        (["--prompt", "a", "--tokenizer", "/nowhere"], "--tokenizer /nowhere"),
        (["--prompt-file", "/nowhere.txt"], "--prompt-file /nowhere.txt cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_run_is_one_line(
    saved: str, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert cli.main(["generate", "--load", saved, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1


def test_a_folder_without_a_checkpoint_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--load", str(tmp_path), "--prompt", "a"]) == 2
    assert "there is no checkpoint of the reference trainer" in capsys.readouterr().err


def test_ctrl_c_ends_with_what_was_generated_and_no_process(saved: str) -> None:
    words = ["--load", saved, "--prompt", "def ", "x", "--max-new-tokens", "20000", "--head-dim-parallel", "1,2"]
    with subprocess.Popen(
        [*GENERATE, *words, "--past-end"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        shown = running.stdout.read(40)
        started = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGINT)
        rest, said = running.stdout.read(), running.stderr.read()
        assert running.wait(60) == 130
    assert len(started) >= 2 and not psutil.wait_procs(started, timeout=20)[1]
    assert shown.startswith("== 1 of 2\ndef ") and "== 2 of 2\nx" in rest
    assert "(stopped)" in said and "Traceback" not in said


@pytest.mark.slow
def test_the_example_says_the_same(saved: str) -> None:
    words = ["--load", saved, "--prompt", "def ", "--max-new-tokens", "12"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "examples/generate.py"), *words, "--head-dim-parallel", "2,1"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == generated(words)[0] and "12 tokens in" in done.stderr
