"""Checkpoints move between stock and any grid: parameters, fp32 copies and Adam's moments are bit-identical."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from hp_plugin.attention import layers
from hp_plugin.grid.ranks import HEAD_INNERMOST
from hp_plugin.training.checkpoints.state import content_metadata, restore, sharded_state
from hp_plugin.training.step import Trainer
from tests.adapters.checkpoint_cases import (
    LAYOUTS,
    MODELS,
    OPTIMIZERS,
    STOCK,
    Layout,
    folder_of,
    loss_of,
    same,
    scramble,
    snapshot,
    step,
    trainer_on,
    training_config,
)
from tests.ranks import Ranks

# fp32 sums in another order move a loss of about 4 by a few units in the last place; Adam amplifies it a little.
FP32_LOSS = 1e-5

pytestmark = [
    # What Megatron-Core's checkpoints call in torch.
    pytest.mark.filterwarnings("ignore:.*load_state_dict. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*we are deprecating ShardedTensor:FutureWarning"),
]


def save(trainer: Trainer, folder: str, **metadata: Any) -> None:
    described = content_metadata(trainer) | metadata
    dist_checkpointing.save(sharded_state(trainer, 2, described), folder)


def load(trainer: Trainer, folder: str, **metadata: Any) -> None:
    described = content_metadata(trainer) | metadata
    state = sharded_state(trainer, 0, described, loading=True, random_states=False)
    restore(trainer, dist_checkpointing.load(state, folder))


def contents(folder: str) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, as it lies on disk."""
    return {k: v for k, v in dist_checkpointing.load_plain_tensors(folder).items() if isinstance(v, torch.Tensor)}


def travel(path: str, model: str, optimizer: str, layouts: tuple[Layout, ...]) -> list[tuple[str, list[str], float]]:
    """Stock saves; every layout loads that, saves it again, trains on; stock loads the last of these."""
    options = MODELS[model] | OPTIMIZERS[optimizer]
    with trainer_on(training_config(STOCK, **options)) as trainer:
        for iteration in range(2):
            step(trainer, iteration)
        origin = folder_of(path, "origin")
        save(trainer, origin)
        expected = snapshot(trainer)
        loss = loss_of(step(trainer, 2))
        next_loss = loss_of(step(trainer, 3))
    assert sum("exp_avg" in name for name in expected) >= 2 * sum("(param)" in name for name in expected)
    on_disk = contents(origin)
    found, folder = [], origin
    for layout in (*layouts, STOCK):
        with trainer_on(training_config(layout, **options)) as trainer:
            scramble(trainer)
            load(trainer, folder)
            wrong = same(snapshot(trainer), expected)
            # The next layout loads what this one saves: a ring over all of them.
            folder = folder_of(path, f"{len(found)}-{layout.label}")
            save(trainer, folder)
            wrong += [f"{name} on disk" for name in same(contents(folder), on_disk)]
            drift = abs(loss_of(step(trainer, 2)) - loss) + abs(loss_of(step(trainer, 3)) - next_loss)
            found.append((layout.label, wrong, drift))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "optimizer", "layouts"),
    [
        ("gqa-bias", "fp32", LAYOUTS),
        ("mha-qknorm", "bf16", LAYOUTS[1::2]),
        ("gated", "distributed", LAYOUTS[4:]),
        ("gqa-bias", "distributed-bf16", LAYOUTS[:5]),
        ("mha-qknorm", "fp16", LAYOUTS[5::2]),
    ],
)
def test_every_layout_loads_and_saves_the_same_tensors(
    ranks: Ranks, tmp_path: Path, model: str, optimizer: str, layouts: tuple[Layout, ...]
) -> None:
    # Half precision rounds partial sums by layout: there the losses only have to stay near.
    tolerance = FP32_LOSS if optimizer in ("fp32", "distributed") else 2e-2
    for label, wrong, drift in ranks.run(4, travel, str(tmp_path), model, optimizer, layouts, timeout=600)[0]:
        assert not wrong, f"{label}: {wrong[:5]}"
        assert drift < tolerance, f"{label}: losses {drift} off"


@pytest.mark.slow
def test_checkpoints_do_not_see_the_order_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    dim, head = Layout("2,2"), Layout("2,2", order=HEAD_INNERMOST)
    found = ranks.run(4, travel, str(tmp_path), "gqa-bias", "distributed", (head, dim, head), timeout=600)[0]
    for label, wrong, drift in found:
        assert not wrong and drift < FP32_LOSS, f"{label}: {wrong[:5]}, losses {drift} off"


def without_slices(path: str) -> list[str]:
    """A grid that describes its shards as stock does, contiguous: what must not go unnoticed by the tests above."""
    layers.grid_piece = lambda stock, *args: stock
    try:
        options = MODELS["gqa-bias"]
        with trainer_on(training_config(STOCK, **options)) as trainer:
            step(trainer, 0)
            folder = folder_of(path, "origin")
            save(trainer, folder)
            expected = snapshot(trainer)
        with trainer_on(training_config(Layout("2,2"), **options)) as trainer:
            load(trainer, folder)
            return same(snapshot(trainer), expected)
    finally:
        from hp_plugin.checkpoint.pieces import grid_piece

        layers.grid_piece = grid_piece


def test_without_the_pieces_exactly_the_grid_weights_come_out_wrong(ranks: Ranks, tmp_path: Path) -> None:
    wrong = ranks.run(4, without_slices, str(tmp_path))[0]
    assert {name.split()[2] for name in wrong} == {
        "self_attention.linear_qkv.weight",
        "self_attention.linear_qkv.bias",
        "self_attention.linear_proj.weight",
    }
    assert {name.split()[-1] for name in wrong} == {"(param)", "(fp32)", "(exp_avg)", "(exp_avg_sq)"}


def own_bytes(path: str, sharding_type: str) -> tuple[list[str], list[str]]:
    """Optimizer state that is a rank's own: back on the same grid, then on three other layouts of the same TP size."""
    # bf16: upstream's loader of dp_reshardable writes in place to what fp32 parameters would require gradients for.
    options = MODELS["gqa-bias"] | OPTIMIZERS["distributed-bf16"]
    metadata = {"distrib_optim_sharding_type": sharding_type}
    with trainer_on(training_config(Layout("2,2"), **options)) as trainer:
        step(trainer, 0)
        folder = folder_of(path, "grid")
        save(trainer, folder, **metadata)
        expected = snapshot(trainer)
    with trainer_on(training_config(Layout("2,2"), **options)) as trainer:
        scramble(trainer)
        load(trainer, folder, **metadata)
        wrong = same(snapshot(trainer), expected)
    with trainer_on(training_config(Layout(tp=4), **options)) as trainer:
        step(trainer, 0)
        stock_folder = folder_of(path, "stock")
        save(trainer, stock_folder, **metadata)
    loaded = []
    sources = [(Layout(tp=4), folder), (Layout("1,4"), folder), (Layout("2,2", order=HEAD_INNERMOST), folder)]
    for layout, source in (*sources, (Layout("2,2"), stock_folder)):
        with trainer_on(training_config(layout, **options)) as trainer:
            try:
                load(trainer, source, **metadata)
            except CheckpointException as refusal:  # of torch; no Exception
                if layout.grid is not None:
                    assert f"of_grid_{layout.label}" in str(refusal)
                assert "from model not in state dict" in str(refusal)
                continue
            loaded.append(layout.label)
    return wrong, loaded


def test_dp_reshardable_state_loads_on_its_own_grid_only(ranks: Ranks, tmp_path: Path) -> None:
    wrong, loaded = ranks.run(4, own_bytes, str(tmp_path), "dp_reshardable")[0]
    assert not wrong
    assert not loaded, f"loaded without a word on {loaded}"


def flattened(path: str) -> str:
    options = MODELS["gqa-bias"] | OPTIMIZERS["distributed"]
    with trainer_on(training_config(Layout("2,2"), **options)) as trainer:
        step(trainer, 0)
        try:
            save(trainer, folder_of(path, "flat"), distrib_optim_sharding_type="fully_sharded_model_space")
        except (ValueError, CheckpointingException) as refusal:
            return str(refusal)
    return ""


def test_flattened_optimizer_state_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    assert "flattened_range is not supported" in ranks.run(4, flattened, str(tmp_path))[0]
