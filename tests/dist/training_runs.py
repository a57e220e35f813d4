"""Bodies for tests of the reference trainer: a small model, run on the ranks by examples/pretrain_gpt.py itself."""

import importlib.util
import io
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hp_plugin.training.arguments import parse_arguments
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.corpus import build_corpus
from hp_plugin.training.data import batches, build_datasets
from hp_plugin.training.distributed import running_ranks
from hp_plugin.training.initialization import initialize_parameters, named_global_parameters
from hp_plugin.training.model import build_gpt
from tests.ranks import destroy_groups_but

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --micro-batch-size 4 "
    "--global-batch-size 8 --lr 3e-3 --attention-dropout 0 --hidden-dropout 0 --seed 1 --train-iters 20 "
    "--position-embedding-type rope"
)


def example(name: str = "pretrain_gpt") -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def configured(cache: str, flags: str) -> TrainingConfig:
    return parse_arguments([*shlex.split(f"{SMALL} {flags}"), "--data-cache-path", cache])


def train(cache: str, flags: str = "") -> tuple[dict[int, float], str]:
    """{iteration: lm loss} (on the last rank) and what this rank printed."""
    pretrain_gpt, config, said = example(), configured(cache, flags), io.StringIO()
    try:
        with redirect_stdout(said):
            losses = pretrain_gpt.pretrain(config, pretrain_gpt.check(config))
    finally:
        destroy_groups_but(dist.group.WORLD)  # several runs in one job
    return losses, said.getvalue()


def train_with_other_seed_on(rank: int, cache: str) -> str:
    try:
        train(cache, f"--seed {7 if dist.get_rank() == rank else 1} --train-iters 1")
    except ValueError as refusal:
        return str(refusal)
    return "trained"


def initial_weights(cache: str, flags: str) -> list[tuple[str, int, Any]]:
    """(global name, partition axis or -1, this rank's part) of every parameter."""
    config = configured(cache, flags)
    transformer_config = example().check(config)
    with running_ranks(config):
        chunks = [None] if config.virtual_pipeline is None else range(config.virtual_pipeline)
        models = [build_gpt(config, transformer_config, chunk) for chunk in chunks]
        initialize_parameters(models, transformer_config, config.seed)
        return [
            (
                name,
                parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else -1,
                _plain(parameter),
            )
            for model in models
            for name, _, parameter in named_global_parameters(model)
        ]


def batches_read(cache: str, flags: str, iterations: int) -> list[list[list[int]]]:
    """The tokens of every micro-batch this rank reads, one list per sequence."""
    config = configured(cache, flags)
    with running_ranks(config):
        batch_size = config.batch_size(dist.get_world_size())
        dataset = build_datasets(config, batch_size)[0]
        return [batch["tokens"].tolist() for batch in batches(dataset, config, iterations, batch_size)]


def build_and_look(cache: Path) -> tuple[str, list[int]]:
    """The prefix of the default data set and the sizes its files have the moment it is there, in bytes."""
    dist.barrier()
    prefix = build_corpus(cache)
    return prefix, [Path(prefix + ending).stat().st_size for ending in (".bin", ".idx")]


def _plain(tensor: Tensor) -> Any:
    # Arrays, not tensors: the pipe to the test process carries plain values.
    return tensor.detach().float().numpy()
