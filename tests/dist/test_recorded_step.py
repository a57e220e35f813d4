"""A recorded step of real layers has exactly the collectives that the planner predicts, size by size."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from megatron.core import parallel_state

from hp_plugin.compare.entries.catalogue import CatalogueModel
from hp_plugin.compare.entries.entrant import enter
from hp_plugin.compare.entries.planned import group_sizes, share_of
from hp_plugin.compare.entries.suites import decode_mode
from hp_plugin.compare.ranks.decode import decoding
from hp_plugin.compare.ranks.running import built
from hp_plugin.compare.ranks.timing import run_step
from hp_plugin.compare.ranks.traffic import Traffic, counted
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.counts.step import step_collectives
from tests.ranks import Ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*local is another function:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*sequence.parallel:UserWarning"),
]

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
    "QK-norm": CatalogueModel("", SMALL | {"qk_layernorm": True}, 8, 4),
    "one key/value head": CatalogueModel("", SMALL | {"num_query_groups": 1}, 8, 4),
    "16 heads": CatalogueModel(
        "", SMALL | {"hidden_size": 64, "num_attention_heads": 16, "num_query_groups": 16, "seq_length": 16}, 8, 4
    ),
    # Too many words for embedding and output layer to work on a share of the tokens.
    "many words": CatalogueModel("", SMALL | {"vocab_size": 640}, 8, 4),
    "many words, gated": CatalogueModel(
        "",
        SMALL | {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True, "vocab_size": 640}
        | {"disable_bias_linear": True, "untie_embeddings_and_output_weights": True},
        8,
        4,
    ),
    "experts": CatalogueModel(
        "",
        SMALL | {"num_experts": 4, "moe_router_topk": 1, "moe_router_pre_softmax": True, "disable_bias_linear": True}
        | {"moe_expert_capacity_factor": 1.0},
        8,
        4,
    ),
    "experts, many words": CatalogueModel(
        "",
        SMALL | {"num_experts": 4, "moe_router_topk": 1, "moe_router_pre_softmax": True, "disable_bias_linear": True}
        | {"moe_expert_capacity_factor": 1.0, "vocab_size": 640},
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
    return of_calls(traffic), foreseen(share, sizes, stage)


def record_decoding(model: CatalogueModel, text: str, context: int) -> tuple[Calls, Calls]:
    """The same of one token of every sequence behind cached prompts."""
    import torch.distributed as dist

    entrant = enter(model, text, dist.get_world_size())
    with decoding(entrant, context) as decoder:
        decoder.step(0)
        with counted() as traffic:
            decoder.step(1)
    return of_calls(traffic), foreseen(share_of(entrant, decode_mode(context)), group_sizes(entrant), 0)


def of_calls(traffic: Traffic) -> Calls:
    return Counter((call.axis, call.kind, round(call.sent, 1)) for call in traffic.calls if call.sent)


def foreseen(share: Share, sizes: dict[str, int], stage: int) -> Calls:
    """What the planner's program of a rank of this stage calls."""
    predicted: Calls = Counter()
    for collective, count in step_collectives(share)[stage].items():
        sent = round(collective.received(sizes[collective.axis]), 1)
        if sent:
            predicted[collective.axis, collective.kind, sent] += count
    return predicted


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("learned positions", "tp=4"),
        ("learned positions", "tp=2"),
        ("learned positions", "grid=2x2,exchange=batch"),
        ("learned positions", "grid=2x2,exchange=sequence"),
        ("learned positions", "grid=2x2"),
        ("learned positions", "grid=4x1"),
        ("rotary", "grid=1x4,exchange=batch"),
        ("rotary", "grid=1x4,exchange=sequence"),
        ("rotary", "grid=1x2,exchange=sequence"),
        ("QK-norm", "grid=2x2,exchange=batch"),
        ("QK-norm", "grid=2x2,exchange=sequence"),
        ("one key/value head", "tp=4"),
        ("one key/value head", "grid=1x4,exchange=sequence"),
    ],
)
def test_a_decode_step_has_the_predicted_collectives(ranks: Ranks, model: str, layout: str) -> None:
    for called, predicted in ranks.run(4, record_decoding, MODELS[model], layout, 24):
        assert called == predicted


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
        (4, "QK-norm", "tp=4"),
        (4, "QK-norm", "grid=2x2,exchange=batch"),
        (4, "QK-norm", "grid=2x2,exchange=scores,sp"),
        (4, "one key/value head", "tp=4"),
        (4, "one key/value head", "grid=1x4,exchange=batch"),
        # What is left open comes to weights here.
        (4, "many words", "grid=2x2"),
        (4, "rotary", "grid=1x2,exchange=batch,pp=2"),
        (4, "learned positions", "tp=2,dp=2,zero=replicated"),
        (4, "learned positions", "tp=2,dp=2"),
        (4, "many words", "grid=2x2,exchange=weights"),
        (4, "many words, gated", "grid=1x4,exchange=weights"),
        (4, "many words, gated", "grid=2x2,exchange=weights,mbs=1"),
        (4, "many words, gated", "grid=2x2,exchange=weights,sp"),
        (4, "many words, gated", "grid=1x2,exchange=weights,pp=2"),
        (4, "learned positions", "grid=2x2,exchange=weights"),
        (4, "rotary", "grid=2x2,exchange=weights,sp"),
        (4, "rotary", "grid=1x4,exchange=weights"),
        (4, "rotary", "grid=1x2,exchange=weights,pp=2"),
        (4, "rotary", "grid=2x2,exchange=weights,mbs=1"),
        (16, "16 heads", "tp=8,pp=2"),
        (16, "16 heads", "grid=4x4,exchange=batch"),
        (4, "experts", "tp=2,pp=2,sp,ep=2"),
        (4, "experts", "grid=2x2,exchange=batch,sp,ep=4"),
        (4, "experts", "grid=2x2,exchange=batch,ep=4,moe=deepspeed"),
        (4, "experts, many words", "grid=2x2,exchange=weights,ep=4,moe=deepspeed"),
        (4, "experts, many words", "grid=1x4,exchange=weights,ep=4,moe=deepspeed,mbs=2"),
        (4, "experts, many words", "grid=2x2,exchange=weights,sp,ep=4,moe=deepspeed"),
    ],
)
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_step_has_the_predicted_collectives(ranks: Ranks, ranks_: int, model: str, layout: str, mode: str) -> None:
    for called, predicted in ranks.run(ranks_, record, MODELS[model], layout, mode):
        # The optimizer's and the trainer's own flags and norms: bytes that no layout changes.
        called = {key: n for key, n in called.items() if key[0] not in ("world", "dp") or key[2] > 32}
        predicted = {key: n for key, n in predicted.items() if key[0] != "world"}
        if "weights" in layout or "exchange" not in layout:
            # Gloo has no reduce-scatter of its own: an all-to-all, and a sum, of as many bytes.
            asked, predicted = predicted, Counter()
            for (axis, kind, sent), n in asked.items():
                kind = "all_to_all" if (axis, kind) == ("dim", "reduce_scatter") else kind
                predicted[axis, kind, sent] += n
        varying = VARYING | ({("ep", "all_to_all")} if "experts" in model and "deepspeed" not in layout else set())
        assert of(called, varying, False) == of(predicted, varying, False)
        for axis, kind in varying:
            (found, sent), (expected, size) = total(called, axis, kind), total(predicted, axis, kind)
            assert found == expected
            if axis == "dp":
                assert size <= sent < 1.02 * size or found == 0


# Megatron-Core pads flat buffers of the distributed optimizer; its own experts get as many tokens as choose them.
VARYING = {("dp", "reduce_scatter"), ("dp", "all_gather")}


def of(calls: dict[tuple[str, str, float], int], kinds: set[tuple[str, str]], wanted: bool) -> dict[Any, int]:
    return {key: count for key, count in calls.items() if (key[:2] in kinds) == wanted}


def total(calls: dict[tuple[str, str, float], int], axis: str, kind: str) -> tuple[int, float]:
    """Number and bytes of the calls of one kind."""
    found = of(calls, {(axis, kind)}, True)
    return sum(found.values()), sum(key[2] * count for key, count in found.items())
