"""`hp-plugin doctor` where torch and Megatron-Core are installed."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_here_the_tests_can_train_and_the_report_is_json() -> None:
    code = "import sys; from hp_plugin.commands.main import main; sys.exit(main(['doctor', '--json']))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["backend"] in ("cpu+gloo", "cuda+nccl")
    assert report["facts"]["versions"]["megatron-core"] == metadata.version("megatron-core")
    assert report["facts"]["broken"] == {}
