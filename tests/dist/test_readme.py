"""The README's command and its Python lines, run as they are written."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from hp_plugin import HeadDimSelfAttention, cpu_backend
from tests.ranks import Ranks

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, first_word: str) -> str:
    """The README's one code block of a language that begins with a word."""
    (found,) = (
        text for text in re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S) if text.startswith(first_word)
    )
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_command_trains() -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    # Where torchrun meets is not the command's matter: another run may be on this machine.
    environment |= {"PET_MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-ec", block("bash", "torchrun")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", done.stdout)]
    assert len(losses) == 20 and losses[-1] < losses[0]


def python_lines() -> tuple[float, int]:
    """Runs the README's Python; a loss of the model, and how many of its layers are on the grid."""
    cpu_backend.enable()
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    names: dict[str, Any] = {"GPTModel": GPTModel, "get_gpt_layer_local_spec": get_gpt_layer_local_spec, "sizes": sizes}
    imports, lines = block("python", "from hp_plugin").split("\n\n")
    register, build = lines.split("config = ")
    exec(f"{imports}\n{register}", names)
    # The reader's own script does this, as it did before.
    model_parallel_cuda_manual_seed(1)
    exec(f"config = {build}", names)
    tokens = torch.arange(64).reshape(1, 64)
    loss = names["model"](tokens, tokens.clone(), None, labels=tokens)
    layers = sum(isinstance(module, HeadDimSelfAttention) for module in names["model"].modules())
    parallel_state.destroy_model_parallel()
    return float(loss.detach().mean()), layers


def test_the_python_lines_build_a_model_on_the_grid(ranks: Ranks) -> None:
    found = ranks.run(4, python_lines)
    assert all(layers == 2 for _, layers in found)
    assert len({round(loss, 5) for loss, _ in found}) == 1 and 0 < found[0][0] < 20
