"""Under `weights` a model holds, saves and loads what it does under `batch`, and a run can go from one to the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from hp_plugin.training.checkpoints.state import content_metadata, sharded_state
from tests.adapters.checkpoint_cases import MODELS, Layout, trainer_on, training_config
from tests.adapters.test_checkpoint_resume import train_saving
from tests.ranks import Ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*load_state_dict. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*we are deprecating ShardedTensor:FutureWarning"),
]


def flattened(tree: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a state dict by its path; sharded tensors as what they say and hold."""
    if isinstance(tree, ShardedTensorFactory):
        return flattened(tree.build(), path)
    if isinstance(tree, ShardedTensor):
        said = (tree.key, tree.dtype, tree.local_shape, tree.global_shape, tree.global_offset, tree.replica_id)
        return {path: (said, None if tree.data is None else tree.data.clone())}
    if isinstance(tree, dict):
        return {k: v for name, part in tree.items() for k, v in flattened(part, f"{path}/{name}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for number, part in enumerate(tree) for k, v in flattened(part, f"{path}/{number}").items()}
    return {path: (None, tree.clone() if isinstance(tree, Tensor) else None)}


def described(exchange: str, model: str, distributed: bool) -> dict[str, Any]:
    """The sharded state of a new model and its optimizer."""
    options = MODELS[model] | {"micro_batch_size": 4, "use_distributed_optimizer": distributed}
    with trainer_on(training_config(Layout("2,2", exchange=exchange), **options)) as trainer:
        state = sharded_state(trainer, 1, content_metadata(trainer), loading=True, random_states=False)
        return flattened({name: state[name] for name in ("model", "optimizer")})


def described_under_both(model: str, distributed: bool) -> None:
    batch, weights = (described(exchange, model, distributed) for exchange in ("batch", "weights"))
    assert batch.keys() == weights.keys() and len(batch) > 20
    for name, (said, held) in batch.items():
        assert said == weights[name][0], name
        assert held is None or torch.equal(held, weights[name][1]), name


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_state_is_bit_for_bit_that_of_batch(ranks: Ranks, model: str, distributed: bool) -> None:
    ranks.run(4, described_under_both, model, distributed)


RUN = "--mock-data --train-iters 6"


def moved(cache: str, folder: str, first: str, second: str, flags: str) -> list[dict[int, float]]:
    whole, _ = train_saving(cache, f"{flags} {first} {RUN}")
    saving = f"--save {folder} --load {folder}"
    begun, _ = train_saving(cache, f"{flags} {first} {saving} {RUN} --save-interval 3 --exit-interval 3")
    ended, _ = train_saving(cache, f"{flags} {second} {saving} {RUN}")
    return [whole, begun, ended]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--use-distributed-optimizer --sequence-parallel --swiglu"])
@pytest.mark.parametrize(("first", "second"), [("batch", "weights"), ("weights", "sequence"), ("weights", "batch")])
def test_a_run_goes_on_under_another_exchange(
    ranks: Ranks, tmp_path: Path, first: str, second: str, flags: str
) -> None:
    grid = "--head-dim-parallel 2,2 --head-dim-exchange"
    folder = str(tmp_path / "run")
    arguments = (folder, f"{grid} {first}", f"{grid} {second}", flags)
    whole, begun, ended = ranks.run(4, moved, str(tmp_path), *arguments, timeout=600)[-1]
    assert sorted(begun) == [1, 2, 3] and sorted(ended) == [4, 5, 6]
    assert begun == {iteration: whole[iteration] for iteration in begun}
    assert ended == pytest.approx({iteration: whole[iteration] for iteration in ended}, abs=1e-5)
