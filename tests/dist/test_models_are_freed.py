"""A comparison builds one model after the other in the same processes: each must be gone before the next."""

from __future__ import annotations

import gc
import weakref

import psutil
import pytest
import torch.distributed as dist

from hp_plugin.compare.entries.catalogue import CatalogueModel
from hp_plugin.compare.entries.entrant import enter
from hp_plugin.compare.ranks.running import built
from hp_plugin.compare.ranks.timing import run_step
from tests.ranks import Ranks

EXPERTS = CatalogueModel(
    "",
    {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 8, "num_experts": 2}
    | {"moe_router_topk": 1, "moe_router_pre_softmax": True, "disable_bias_linear": True},
    4,
    2,
)


ROTARY = CatalogueModel(
    "",
    {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 8, "position_embedding_type": "rope"},
    4,
    2,
)


def train_and_leave(model: CatalogueModel, text: str) -> weakref.ref[object]:
    with built(enter(model, text, dist.get_world_size()).config) as trainer:
        run_step(trainer, "train")
        return weakref.ref(trainer.model[0].module)


def left_behind(model: CatalogueModel, texts: list[str]) -> list[tuple[str, int]]:
    """Layouts whose model is still there after its block, or groups that are; threads that a second time adds."""
    found = []
    threads = []
    for _ in range(2):  # libraries start threads of their own at the first
        for text in texts:
            left = train_and_leave(model, text)
            gc.collect()
            groups = len(dist.distributed_c10d._world.pg_map)
            if left() is not None or groups > 1:
                found.append((text, groups))
        threads.append(psutil.Process().num_threads())
    more = threads[1] - threads[0]
    return [*found, *([("threads", more)] if more > 0 else [])]


# Both keep tensors of their last pass, and a graph that leads to the model itself.
@pytest.mark.filterwarnings("ignore:.*sequence.parallel:UserWarning")
def test_experts_do_not_hold_their_model(ranks: Ranks) -> None:
    layouts = ["tp=2,sp,ep=2", "grid=1x2,ep=2,moe=deepspeed"]
    assert ranks.run(2, left_behind, EXPERTS, layouts) == [[]] * 2


def test_cached_angles_do_not_hold_their_model(ranks: Ranks) -> None:
    layouts = ["tp=2", "grid=1x2,exchange=weights", "grid=2x1", "grid=1x2,exchange=sequence"]
    assert ranks.run(2, left_behind, ROTARY, layouts) == [[]] * 2
