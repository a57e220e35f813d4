"""The reference trainer under `weights`: losses of one rank within 1e-5 over 20 steps, samples and tokens."""

from __future__ import annotations

import pytest

from tests.dist.training_runs import train
from tests.ranks import Ranks

LAYOUTS = {
    "2x2": (4, "", "--head-dim-parallel 2,2"),
    "1x4": (4, "", "--head-dim-parallel 1,4"),
    "4x1": (4, "", "--head-dim-parallel 4,1"),
    "2x2, tokens": (4, "", "--head-dim-parallel 2,2 --micro-batch-size 1"),
    "1x4, tokens": (4, "", "--head-dim-parallel 1,4 --micro-batch-size 2"),
    "2x2 PP=2 interleaved SP": (
        8,
        "--num-layers 4",
        "--head-dim-parallel 2,2 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--sequence-parallel",
    ),
    "2x2 PP=2 interleaved SP, tokens": pytest.param(
        8,
        "--num-layers 4",
        "--head-dim-parallel 2,2 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--sequence-parallel --micro-batch-size 1",
        marks=pytest.mark.slow,
    ),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(("world_size", "model", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_losses_of_one_rank(ranks: Ranks, cache: str, world_size: int, model: str, layout: str) -> None:
    expected, _ = ranks.run(1, train, cache, model)[0]
    found, _ = ranks.run(world_size, train, cache, f"{model} {layout} --head-dim-exchange weights")[-1]
    assert len(found) == 20 and found[20] < found[1] - 0.5
    assert found == pytest.approx(expected, abs=1e-5, rel=0)
