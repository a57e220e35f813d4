"""Runs of Megatron-LM's own pretrain_gpt.py on the CPU, from release trees of a clone that MEGATRON_LM_DIR names."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from megatron.core.datasets import helpers_cpp

ROOT = Path(__file__).parents[2]
PYTHON_OF = {"core_v0.18.2": (3, 12), "core_v0.19.0": (3, 12)}
LINE = re.compile(r"iteration +(\d+)/.*lm loss: (\S+)")

needs_clone = pytest.mark.skipif(
    "MEGATRON_LM_DIR" not in os.environ, reason="MEGATRON_LM_DIR names no clone of Megatron-LM with its release tags"
)

# A padded vocabulary of 4096 on every layout (0.15's mock data has tokens up to 4094); what is off needs Apex,
# Transformer Engine or a GPU.
COMMON = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --kv-channels 8 --ffn-hidden-size 48 --seq-length 16
    --max-position-embeddings 16 --position-embedding-type rope --micro-batch-size 2 --global-batch-size 4
    --train-iters 7 --lr 1e-2 --min-lr 1e-3 --seed 1 --attention-dropout 0 --hidden-dropout 0 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 4095 --distributed-backend gloo --transformer-impl local
    --no-gradient-accumulation-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-masked-softmax-fusion
    --no-persist-layer-norm --no-rope-fusion --log-interval 1 --eval-iters 0 --eval-interval 1000
    --ckpt-format torch_dist
"""
# What a user without the plugin would need to run Megatron-LM on the CPU; plays the part of a GPU.
ON_CPU = """
import sys
if __name__ == "__main__":
    from hp_plugin.cpu_backend import megatron_lm
    sys.argv = sys.argv[1:]
    sys.path[0] = sys.argv[0].rpartition("/")[0]
    megatron_lm.enable()
    exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))  # here: processes it spawns import this file as main
"""
# Stock's own inner attention does not take the widths of latent heads.
SPEC = """
import torch

class PlainCore(torch.nn.Module):
    def __init__(self, config, softmax_scale, **of_stock):
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query, key, value, attention_mask, **of_stock):
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) * self.scale
        weights = scores.masked_fill(attention_mask, -10000.0).softmax(dim=-1)
        return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
layer = get_gpt_layer_local_spec()
latent = get_gpt_layer_local_spec(qk_layernorm=True, multi_latent_attention=True, normalization="RMSNorm")
latent.submodules.self_attention.submodules.core_attention = PlainCore
"""


def release_tree(tag: str, folder: Path) -> Path:
    """A release of the clone as a tree of its own; skips the test where this Python is too old for it."""
    if sys.version_info < PYTHON_OF.get(tag, (3, 10)):
        pytest.skip(f"{tag} needs Python {'.'.join(map(str, PYTHON_OF[tag]))}, and this is {sys.version.split()[0]}")
    archive = ["git", "-C", os.environ["MEGATRON_LM_DIR"], "archive", tag]
    packed = subprocess.run(archive, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        files.extractall(folder, filter="data")
    # Megatron-LM compiles it at the start of every run, where the compiler and `python3-config` agree with it.
    shutil.copy(helpers_cpp.__file__, folder / "megatron/core/datasets")
    (folder / "spec_of_ours.py").write_text(SPEC)  # for --spec
    return folder


def run(
    tree: Path,
    ranks: int,
    flags: str,
    launcher: bool = True,
    script: str = "pretrain_gpt.py",
    common: str = COMMON,
) -> tuple[int, str]:
    """Exit status and output of a script of the tree, through the plugin's launcher or as if the machine had GPUs."""
    driver = tree / "on_cpu.py"
    driver.write_text(ON_CPU)
    # Scripts further down import from the root of the tree.
    roots = [str(ROOT), str(tree)] if "/" in script else [str(ROOT)]
    path = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
    start = ["-m", "hp_plugin.launch"] if launcher else [str(driver)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            *start,
            str(tree / script),
            *shlex.split(common),
            *shlex.split(flags),
        ],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1500,  # many ranks share what may be two cores
    )
    return done.returncode, done.stdout


def losses(tree: Path, ranks: int, flags: str, launcher: bool = True) -> dict[int, float]:
    """The `lm loss` that a run prints for every iteration.

    For the second one after its start that is the mean of the first two: Megatron-LM's `training_log` keeps the sum.
    """
    status, output = run(tree, ranks, flags, launcher)
    assert status == 0, output[-6000:]
    return {int(found[1]): float(found[2]) for found in map(LINE.search, output.splitlines()) if found}
