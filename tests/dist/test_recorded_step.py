"""A recorded step of real layers has exactly the collectives that the planner predicts, size by size."""

from __future__ import annotations

from collections import Counter

import pytest
from megatron.core import parallel_state

from hp_plugin.bench.catalogue import CatalogueModel
from hp_plugin.bench.closed_form import group_sizes, share_of
from hp_plugin.bench.layouts import enter
from hp_plugin.bench.running import built
from hp_plugin.bench.timing import run_step
from hp_plugin.bench.traffic import counted
from hp_plugin.cost.step_program import step_collectives
from tests.ranks import Ranks

Calls = Counter[tuple[str, str, float]]
"""(axis, kind, bytes sent) and how often."""

SMALL = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 12, "num_query_groups": 4, "seq_length": 24}
MODELS = {
    "learned positions": CatalogueModel("", SMALL, 8, 4),
    "rotary": CatalogueModel(
        "",
        SMALL | {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True}
        | {"disable_bias_linear": True, "untie_embeddings_and_output_weights": True},
        8,
        4,
    ),
    "one key/value head": CatalogueModel("", SMALL | {"num_query_groups": 1}, 8, 4),
    "16 heads": CatalogueModel(
        "", SMALL | {"hidden_size": 64, "num_attention_heads": 16, "num_query_groups": 16, "seq_length": 16}, 8, 4
    ),
    "experts": CatalogueModel(
        "",
        SMALL | {"num_experts": 4, "moe_router_topk": 1, "moe_router_pre_softmax": True, "disable_bias_linear": True}
        | {"moe_expert_capacity_factor": 1.0},
        8,
        4,
    ),
}  # fmt: skip


def record(model: CatalogueModel, text: str, mode: str) -> tuple[Calls, Calls]:
    """What this rank called in one step, and what is predicted for it."""
    import torch.distributed as dist

    entrant = enter(model, text, dist.get_world_size())
    share, sizes = share_of(entrant, mode), group_sizes(entrant)
    with built(entrant.config) as trainer:
        run_step(trainer, mode)
        with counted() as traffic:
            run_step(trainer, mode)
        stage = parallel_state.get_pipeline_model_parallel_rank()
    called = Counter((call.axis, call.kind, round(call.sent, 1)) for call in traffic.calls if call.sent)
    predicted: Calls = Counter()
    for collective, count in step_collectives(share)[stage].items():
        sent = round(collective.received(sizes[collective.axis]), 1)
        if sent:
            predicted[collective.axis, collective.kind, sent] += count
    return called, predicted


@pytest.mark.parametrize(
    ("ranks_", "model", "layout"),
    [
        (4, "learned positions", "grid=2x2,exchange=batch"),
        (4, "rotary", "grid=2x2,exchange=batch"),
        (4, "rotary", "grid=2x2,exchange=sequence"),
        (4, "rotary", "grid=1x4,exchange=scores"),
        (4, "rotary", "grid=2x2,exchange=local"),
        (4, "learned positions", "grid=2x2,exchange=sequence,sp"),
        (4, "learned positions", "grid=4x1"),
        (4, "learned positions", "tp=4,sp"),
        (4, "one key/value head", "tp=4"),
        (4, "one key/value head", "grid=1x4"),
        (4, "rotary", "grid=1x2,pp=2"),
        (4, "learned positions", "tp=2,dp=2,zero=replicated"),
        (4, "learned positions", "tp=2,dp=2"),
        (16, "16 heads", "tp=8,pp=2"),
        (16, "16 heads", "grid=4x4"),
        (4, "experts", "tp=2,pp=2,sp,ep=2"),
        (4, "experts", "grid=2x2,sp,ep=4"),
        (4, "experts", "grid=2x2,ep=4,moe=deepspeed"),
    ],
)
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_step_has_the_predicted_collectives(ranks: Ranks, ranks_: int, model: str, layout: str, mode: str) -> None:
    for called, predicted in ranks.run(ranks_, record, MODELS[model], layout, mode):
        # The optimizer's and the trainer's own flags and norms: bytes that no layout changes.
        small = {key for key in called if key[0] in ("world", "dp") and key[1] == "all_reduce" and key[2] <= 32}
        predicted = Counter({key: count for key, count in predicted.items() if key[0] != "world"})
        assert called - Counter({key: called[key] for key in small}) == predicted
