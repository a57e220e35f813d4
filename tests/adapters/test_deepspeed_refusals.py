"""Every way to train without the grid, or on two grids at once, under DeepSpeed is an error before training starts."""

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hp_plugin.config import HeadDimConfig
from tests.adapters.deepspeed_cases import (
    DeepSpeedCase,
    build_gpt,
    deepspeed_rank,
    run_steps,
    settings_of,
    start_engine,
)
from tests.ranks import Ranks

pytest.importorskip("deepspeed")

CASE = DeepSpeedCase(m=2, n=1, steps=1)


def refusal(scenario: Callable[[], Any]) -> str:
    """What the ValueError of a scenario says; runs on a rank."""
    with deepspeed_rank():
        try:
            scenario()
        except ValueError as mistake:
            return str(mistake)
        return "nothing was refused"


def of_model(scenario: str) -> str:
    """A model, an mpu or a call that contradicts the configuration."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from hp_plugin import initialize_head_dim_parallel
    from hp_plugin.deepspeed_adapter.engine import initialize, initialize_grid

    def body() -> None:
        settings = settings_of(CASE)
        if scenario == "stock groups":
            parallel_state.initialize_model_parallel(2)
            initialize_grid(settings)
        if scenario == "other grid":
            initialize_head_dim_parallel("1,2")
            initialize_grid(settings)
        if scenario == "other order":
            initialize_head_dim_parallel(HeadDimConfig(2, 2, order="head-innermost"))
            initialize_grid(settings_of(replace(CASE, n=2)))
        if scenario == "world":
            initialize_grid(settings_of(replace(CASE, m=3)))
        if scenario == "pipeline":
            initialize_grid(settings, pipeline_model_parallel_size=2)
            initialize(model=torch.nn.Linear(2, 2), config=settings)
        if scenario == "no attention at all":
            initialize(model=torch.nn.Linear(2, 2), config=settings)
        if scenario == "no model":
            initialize(config=settings)
        if scenario == "mesh":
            initialize(model=torch.nn.Linear(2, 2), config=settings, mesh_param=(1, 2))
        if scenario == "mpu":
            wrong = SimpleNamespace(get_tensor_model_parallel_world_size=lambda: 4)
            initialize(model=torch.nn.Linear(2, 2), config=settings, mpu=wrong)
        if scenario == "mute mpu":
            initialize(model=torch.nn.Linear(2, 2), config=settings, mpu=SimpleNamespace())
        initialize_grid(settings)
        tensor_parallel.model_parallel_cuda_manual_seed(123)
        if scenario == "fusion":
            model = build_gpt(CASE)
            model.config.gradient_accumulation_fusion = True
            initialize(model=model, config=settings)
        if scenario == "DDP":
            model = build_gpt(CASE)
            ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
            initialize(model=ddp, config=settings)
        if scenario == "exchange":
            named = settings | {"head_dim_parallel": {"m": 2, "n": 1, "exchange": "scores"}}
            initialize(model=build_gpt(CASE), config=named)
        if scenario == "mixed model":
            from megatron.core.transformer.attention import SelfAttention

            model = build_gpt(CASE)
            model.decoder.layers[1].self_attention.__class__ = SelfAttention
            initialize(model=model, config=settings)
        if scenario == "old groups":
            model = build_gpt(CASE)
            parallel_state.destroy_model_parallel()
            initialize_head_dim_parallel("2,1", order="dp-tp-cp-ep-pp")
            initialize(model=model, config=settings)
        if scenario == "option left out":
            del settings["head_dim_parallel"]
            initialize(model=build_gpt(CASE), config=settings)
        if scenario == "plain deepspeed.initialize":
            import deepspeed

            deepspeed.initialize(model=build_gpt(CASE), config=settings)

    return refusal(body)


OF_MODEL = {
    "stock groups": "names the grid 2,1, but model parallelism was already initialized without one",
    "other order": "names the grid 2,2, but 2,2 head-innermost is registered already",
    "other grid": "names the grid 2,1, but 1,2 is registered already",
    "world": "world size 4 is not a multiple of 3",
    "pipeline": "2 pipeline stages",
    "no attention at all": "no attention layer on the grid",
    "no model": "needs a model",
    "mesh": "mesh_param",
    "mpu": "get_tensor_model_parallel_world_size.. = 4, head_dim_parallel says m·n = 2·1 = 2: leave the mpu out",
    "mute mpu": "does not tell its tensor-parallel size",
    "fusion": "gradient_accumulation_fusion=False",
    "DDP": "DistributedDataParallel.*bare model",
    "exchange": "exchange 'scores', decoder.layers.0.self_attention was built with 'auto'",
    "mixed model": "1 attention layer.s. are off the grid, the first is decoder.layers.1.self_attention",
    "old groups": "decoder.layers.0.self_attention was built on the grid 2,1 with other groups of ranks",
    "option left out": "the model is on a grid, but the DeepSpeed configuration has no 'head_dim_parallel'",
    "plain deepspeed.initialize": "hp_plugin.deepspeed_adapter.engine.initialize in its place",
}


@pytest.mark.parametrize("scenario", OF_MODEL)
def test_refuses_in_words(ranks: Ranks, scenario: str) -> None:
    for said in ranks.run(4, of_model, scenario):
        assert re.search(OF_MODEL[scenario], said), said


def other_ways_in(folder: str) -> list[list[float]]:
    """Losses of engines started from a file with a function as model, from `args`, and with parallel_state as mpu."""
    from megatron.core import parallel_state, tensor_parallel

    from hp_plugin.deepspeed_adapter.engine import initialize

    with deepspeed_rank():
        settings = settings_of(CASE)
        path = Path(folder) / f"ds_config_{torch.distributed.get_rank()}.json"
        path.write_text(json.dumps(settings))
        kept = json.loads(json.dumps(settings))
        losses = [run_steps(start_engine(CASE, settings), range(2)).losses]
        assert settings == kept
        parallel_state.destroy_model_parallel()

        def build(head_dim: Any) -> torch.nn.Module:
            assert (head_dim.m, head_dim.n) == (2, 1)
            tensor_parallel.model_parallel_cuda_manual_seed(123)
            return build_gpt(CASE)

        engine, optimizer, loader, scheduler = initialize(model=build, config=str(path))
        assert (engine.optimizer, loader, scheduler) == (optimizer, None, None)
        losses.append(run_steps(engine, range(2)).losses)
        args = SimpleNamespace(deepspeed_config=str(path), local_rank=-1)
        losses.append(run_steps(initialize(args=args, model=build_gpt(CASE))[0], range(2)).losses)
        engine = initialize(model=build_gpt(CASE), config_params=settings, mpu=parallel_state)[0]
        losses.append(run_steps(engine, range(2)).losses)
        return losses


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_all_ways_to_hand_over_configuration_and_model_are_one(ranks: Ranks, tmp_path: Path) -> None:
    for losses in ranks.run(4, other_ways_in, str(tmp_path)):
        assert all(one == losses[0] for one in losses)


def without_the_option() -> tuple[list[float], list[float]]:
    """The weights after a step of a plain model by both functions."""
    import deepspeed

    from hp_plugin.deepspeed_adapter.engine import initialize

    with deepspeed_rank():
        found = []
        for start_it in (initialize, deepspeed.initialize):
            torch.manual_seed(1)
            model = torch.nn.Linear(4, 1)
            settings = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
            engine = start_it(model=model, config=settings, model_parameters=model.parameters())[0]
            engine.backward(engine(torch.arange(8.0).view(2, 4)).square().mean())
            engine.step()
            found.append(model.weight.flatten().tolist())
        return found[0], found[1]


def test_without_the_option_it_is_deepspeed_initialize(ranks: Ranks) -> None:
    for ours, theirs in ranks.run(2, without_the_option):
        assert ours == theirs


def test_has_the_signature_of_deepspeed_initialize() -> None:
    import deepspeed

    from hp_plugin.deepspeed_adapter.engine import initialize

    def shape(function: Callable[..., Any]) -> list[tuple[str, Any]]:
        return [(name, parameter.default) for name, parameter in inspect.signature(function).parameters.items()]

    assert shape(initialize) == shape(deepspeed.initialize)


GUARD = """
import sys, warnings
warnings.simplefilter("ignore")
KEY = {"train_batch_size": 1, "head_dim_parallel": {"m": 1, "n": 1}}

def parse():
    from deepspeed.runtime.config import DeepSpeedConfig
    try:
        DeepSpeedConfig(KEY)
    except ValueError as refusal:
        return "refused: " + str(refusal)
    return "taken"

"""


def run_guard(code: str) -> list[str]:
    """The marked lines that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", GUARD + code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("> ") for line in done.stdout.splitlines() if line.startswith("> ")]


def test_the_guard_is_up_only_after_it_was_put_up() -> None:
    early, late, without = run_guard(
        "import hp_plugin.deepspeed_adapter.engine\n"
        "from hp_plugin.deepspeed_adapter.guard import guard_plain_deepspeed\n"
        "print('>', parse())\n"
        "guard_plain_deepspeed(); guard_plain_deepspeed()\n"
        "print('>', parse())\n"
        "del KEY['head_dim_parallel']\n"
        "print('>', parse())\n"
    )
    assert early == without == "taken"
    assert late.startswith("refused: ") and "hp_plugin.deepspeed_adapter.engine.initialize" in late


def test_the_guard_waits_for_deepspeed_to_be_imported() -> None:
    loaded, finders, said = run_guard(
        "from hp_plugin.deepspeed_adapter.guard import guard_plain_deepspeed\n"
        "before = list(sys.meta_path)\n"
        "guard_plain_deepspeed(); guard_plain_deepspeed()\n"
        "print('>', 'deepspeed' in sys.modules)\n"
        "said = parse()\n"
        "print('>', sys.meta_path == before)\n"
        "print('>', said)\n"
    )
    assert (loaded, finders) == ("False", "True")
    assert said.startswith("refused: ")
