"""Checkpoints of DeepSpeed's engine: its own resume bit-equal on one grid, Megatron's carry weights to another."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from hp_plugin.attention.registration import initialize_head_dim_parallel
from hp_plugin.config import HeadDimConfig
from tests.adapters.deepspeed_cases import (
    DeepSpeedCase,
    EngineOutcome,
    build_gpt,
    deepspeed_rank,
    parameters_of,
    run_steps,
    settings_of,
    start_engine,
)
from tests.dist.gpt_parts import assemble
from tests.ranks import Ranks

pytest.importorskip("deepspeed")

pytestmark = [
    # What saving and loading says by itself in torch 2.13.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CASE = DeepSpeedCase(clip_grad=0.5, model={"sequence_parallel": True})


def save_and_resume(case: DeepSpeedCase, folder: str) -> tuple[EngineOutcome, EngineOutcome]:
    """Two steps, a checkpoint and two more; then the same last two by another engine that loads it."""
    with deepspeed_rank():
        engine = start_engine(case)
        run_steps(engine, range(2))
        engine.save_checkpoint(folder)
        straight = run_steps(engine, range(2, 4))
        other = start_engine(case)
        for parameter in other.module.parameters():
            parameter.data.zero_()
        path, _ = other.load_checkpoint(folder)
        assert path is not None
        return straight, run_steps(other, range(2, 4))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, torch.float32), (1, torch.bfloat16), (3, torch.float32)],
)
def test_deepspeeds_own_resumes_bit_equal(ranks: Ranks, tmp_path: Path, stage: int, dtype: torch.dtype) -> None:
    for straight, resumed in ranks.run(8, save_and_resume, replace(CASE, stage=stage, dtype=dtype), str(tmp_path)):
        assert resumed.losses == straight.losses
        assert resumed.grad_norms == straight.grad_norms
        for name, (tensor, _, _) in straight.params.items():
            assert torch.equal(resumed.params[name][0], tensor), name


OTHERS = {"2x1": replace(CASE, m=2, n=1), "1x2": replace(CASE, m=1, n=2)}


def save_here_and_load_elsewhere(stage: int, folder: str) -> dict[str, str]:
    """What a grid, another grid and stock DeepSpeed say to each other's checkpoints; "loaded" for its own."""
    import deepspeed

    from hp_plugin.deepspeed_adapter.checkpoint_layout import FILE
    from hp_plugin.deepspeed_adapter.guard import adapter_calls
    from hp_plugin.deepspeed_adapter.mpu import GridMpu

    said = {}
    with deepspeed_rank():
        for name, case in OTHERS.items():
            engine = start_engine(replace(case, stage=stage))
            run_steps(engine, range(1))
            engine.save_checkpoint(f"{folder}/{name}", tag="here")
            parallel_state.destroy_model_parallel()
        for name, case in OTHERS.items():
            engine = start_engine(replace(case, stage=stage))
            for saved in OTHERS:
                said[f"{saved} on {name}"] = answer(lambda: engine.load_checkpoint(f"{folder}/{saved}"))  # noqa: B023
            if dist.get_rank() == 0:
                shutil.copytree(f"{folder}/{name}", f"{folder}/{name}-bare")
                Path(folder, f"{name}-bare", "here", FILE).unlink()
            dist.barrier()
            said[f"unrecorded on {name}"] = answer(lambda: engine.load_checkpoint(f"{folder}/{name}-bare"))  # noqa: B023
            parallel_state.destroy_model_parallel()
        # The same module on slices of heads by itself, as plain DeepSpeed would have it from a script of stock's.
        case = replace(OTHERS["2x1"], stage=stage)
        initialize_head_dim_parallel(HeadDimConfig(2, 1))
        tensor_parallel.model_parallel_cuda_manual_seed(123)
        settings = {key: value for key, value in settings_of(case).items() if key != "head_dim_parallel"}
        with adapter_calls():
            engine = deepspeed.initialize(model=build_gpt(case), config=settings, mpu=GridMpu.from_parallel_state())[0]
        said["1x2 in stock"] = answer(lambda: engine.load_checkpoint(f"{folder}/1x2"))
        parallel_state.destroy_model_parallel()
    return said


def answer(load: Callable[[], tuple[str | None, Any]]) -> str:
    try:
        return "loaded" if load()[0] is not None else "nothing"
    except (ValueError, RuntimeError) as refusal:
        return str(refusal)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_engines_checkpoint_loads_only_on_the_layout_that_saved_it(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    for said in ranks.run(2, save_here_and_load_elsewhere, stage, str(tmp_path)):
        assert said["2x1 on 2x1"] == said["1x2 on 1x2"] == said["unrecorded on 2x1"] == "loaded"
        assert "saved with the grid 1,2" in said["1x2 on 2x1"] and "this run has the grid 2,1" in said["1x2 on 2x1"]
        assert "saved with the grid 2,1" in said["2x1 on 1x2"] and "save_weights there" in said["2x1 on 1x2"]
        assert "has no head_dim_layout.json: it was saved in stock" in said["unrecorded on 1x2"]
        assert "saved_on_head_dim_grid" in said["1x2 in stock"]


def train_and_save_weights(case: DeepSpeedCase, folder: str) -> EngineOutcome:
    """Two steps, then a Megatron checkpoint; the parameters saved, and the loss of a third step."""
    from hp_plugin.deepspeed_adapter.weights import save_weights

    with deepspeed_rank():
        engine = start_engine(case)
        run_steps(engine, range(2))
        save_weights(engine, folder)
        params = parameters_of(engine)
        return EngineOutcome(run_steps(engine, range(2, 3)).losses, [], params)


def load_and_train(case: DeepSpeedCase, folder: str) -> EngineOutcome:
    """The parameters that another grid loads, and the loss of a third step from them."""
    from hp_plugin.deepspeed_adapter.engine import initialize, initialize_grid
    from hp_plugin.deepspeed_adapter.weights import load_weights

    with deepspeed_rank():
        initialize_grid(settings_of(case))
        tensor_parallel.model_parallel_cuda_manual_seed(123)
        model = build_gpt(case)
        for parameter in model.parameters():
            parameter.data.fill_(dist.get_rank())
        load_weights(model, folder)
        engine = initialize(model=model, config=settings_of(case))[0]
        params = parameters_of(engine)
        return EngineOutcome(run_steps(engine, range(2, 3)).losses, [], params)


@pytest.mark.parametrize(
    ("saved_stage", "m", "n", "stage"), [(3, 1, 4, 1), (1, 2, 1, 2), (1, 2, 2, 3)], ids=["3 1x4", "1 2x1", "1 to 3"]
)
def test_weights_move_to_another_grid(
    ranks: Ranks, tmp_path: Path, saved_stage: int, m: int, n: int, stage: int
) -> None:
    case = replace(CASE, model={}, stage=saved_stage)
    saved = ranks.run(4, train_and_save_weights, case, str(tmp_path / "weights"))
    loaded = ranks.run(4, load_and_train, replace(case, m=m, n=n, stage=stage), str(tmp_path / "weights"))
    theirs, ours = assemble([one.params for one in saved], 4), assemble([one.params for one in loaded], m * n)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    for one in loaded:
        assert one.losses == pytest.approx(saved[0].losses, abs=1e-5)


def refused_weights(folder: str) -> list[str]:
    """What saving over something, loading nothing and loading into an engine are answered with."""
    from hp_plugin.deepspeed_adapter.weights import load_weights, save_weights

    with deepspeed_rank():
        engine = start_engine(replace(CASE, m=2, n=1))
        said = []
        for call in (
            lambda: save_weights(engine, folder),
            lambda: load_weights(build_gpt(replace(CASE, m=2, n=1)), folder),
            lambda: load_weights(engine, folder),
        ):
            with pytest.raises(ValueError) as refusal:
                call()
            said.append(str(refusal.value))
        return said


def test_refuses_folders_and_engines_in_words(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    for full, empty, taken in ranks.run(2, refused_weights, str(tmp_path)):
        assert "is not empty" in full
        assert "holds no Megatron distributed checkpoint" in empty
        assert "before hp_plugin.deepspeed_adapter.engine.initialize" in taken
