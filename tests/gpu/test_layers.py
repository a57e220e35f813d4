"""One attention layer and small models with four ranks on one GPU, beside stock on one rank of the same GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from hp_plugin.config import HeadDimConfig
from tests.dist import gpt
from tests.dist.attention_cases import Case, differences
from tests.dist.gpt import Case as Model
from tests.dist.gpt import Outcome
from tests.dist.gpt_parts import assemble
from tests.gpu.rehearsal import marked
from tests.ranks import Ranks

GRIDS = ((2, 2), (1, 4), (4, 1))
# Sums in another order, on kernels that choose their own.
FP32 = 2e-5

LAYERS = [
    *(
        Case(m, n, exchange, h=4, g=4, d=16, s=16, b=4, rope={})
        for m, n in GRIDS
        for exchange in ("batch", "sequence", "scores", "local")
    ),
    *(
        Case(2, 2, exchange, h=4, g=2, d=16, s=16, b=4, mask=mask, rope={})
        for exchange in ("batch", "sequence", "scores")
        for mask in ("padding", "arbitrary")
    ),
    *(Case(2, 2, name, h=4, g=2, s=16, sequence_parallel=True, rope={}) for name in ("batch", "sequence", "scores")),
    Case(2, 2, "batch", h=4, g=2, d=16, s=16, b=2, config={"window_size": (5, 0)}),
]
FUSED = [
    Case(2, 2, "batch", h=4, g=2, d=64, s=32, b=2, rope={}),
    Case(2, 2, "batch", h=4, g=2, d=512, s=16, b=2),
    Case(2, 2, "batch", h=4, g=2, d=64, s=24, b=4, mask="arbitrary"),
    Case(2, 2, "batch", h=4, g=2, d=64, s=24, b=2, config={"window_size": (5, 0)}),
    Case(2, 2, "local", h=4, g=2, d=64, s=24, b=2),
]


@pytest.mark.parametrize("case", marked({case.label: case for case in LAYERS}, LAYERS[0].label))
def test_output_and_every_gradient(ranks: Ranks, case: Case) -> None:
    for found in ranks.run(4, differences, case):
        assert max(found.values()) < FP32, found


@pytest.mark.parametrize("case", marked({case.label: case for case in FUSED}, FUSED[1].label))
def test_the_fused_core_is_stocks_unfused_one(ranks: Ranks, case: Case) -> None:
    case = replace(case, config={**case.config, "attention_backend": AttnBackend.fused})
    for found in ranks.run(4, differences, case):
        assert max(found.values()) < FP32, found


def of_one_rank(outcomes: list[Outcome]) -> tuple[list[float], dict[str, torch.Tensor]]:
    return outcomes[0].losses, assemble([outcome.grads for outcome in outcomes], len(outcomes))


MODELS: dict[str, Model] = {
    **{
        f"{m}x{n} {name}": Model(tp=4, grid=HeadDimConfig(m, n, name), layers=2, model={"num_query_groups": 4})
        for m, n in GRIDS
        for name in ("batch", "sequence", "scores", "weights")
    },
    "batch, SP": Model(tp=4, grid=HeadDimConfig(2, 2, "batch"), layers=2, model={"sequence_parallel": True}),
    "weights, tokens": Model(tp=4, grid=HeadDimConfig(2, 2, "weights"), layers=2, micro_batch=1),
    "weights, SP": Model(tp=4, grid=HeadDimConfig(2, 2, "weights"), layers=2, model={"sequence_parallel": True}),
    "batch, PP": Model(tp=2, pp=2, grid=HeadDimConfig(1, 2, "batch"), layers=2),
    "sequence, interleaved": Model(tp=2, pp=2, vp=2, grid=HeadDimConfig(1, 2, "sequence")),
    "weights, PP": Model(tp=2, pp=2, grid=HeadDimConfig(1, 2, "weights"), layers=2),
    "batch, full recompute": Model(
        tp=4,
        grid=HeadDimConfig(2, 2, "batch"),
        layers=2,
        model={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "distributed optimizer, overlapped": Model(
        tp=2, grid=HeadDimConfig(1, 2, "batch"), layers=2, distributed_optimizer=True, overlap=True
    ),
}


@pytest.mark.parametrize("case", marked(MODELS, "weights, SP"))
def test_losses_and_gradients_of_one_rank(ranks: Ranks, case: Model) -> None:
    alone: dict[str, Any] = dict(tp=1, pp=1, vp=None, grid=None, distributed_optimizer=False, overlap=False)
    plain = {name: value for name, value in case.model.items() if name not in ("sequence_parallel",)}
    losses, grads = of_one_rank(ranks.run(1, gpt.train, replace(case, **alone, model=plain)))
    outcomes = ranks.run(4, gpt.train, case)
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(losses, rel=FP32)
    found = assemble([outcome.grads for outcome in outcomes], case.tp)
    for name, expected in grads.items():
        scale = max(expected.abs().max().item(), 1e-3)
        assert (found[name] - expected).abs().max().item() < 10 * FP32 * scale, name


@pytest.mark.parametrize("name", marked({name: name for name in ("batch", "sequence", "scores", "weights")}, "batch"))
def test_bf16_trains_as_well_as_stock_in_bf16(ranks: Ranks, name: str) -> None:
    case = Model(tp=4, grid=HeadDimConfig(2, 2, name), layers=2, dtype=torch.bfloat16)
    full = ranks.run(1, gpt.train, replace(case, tp=1, grid=None, dtype=torch.float32))[0].losses
    stock = ranks.run(1, gpt.train, replace(case, tp=1, grid=None))[0].losses
    grid = ranks.run(4, gpt.train, case)[0].losses
    assert len(grid) == len(full)
    for truth, theirs, mine in zip(full, stock, grid, strict=True):
        # A few roundings of 2^-8 in sums of another order.
        assert abs(mine - truth) <= 4 * abs(theirs - truth) + 2**-8 * abs(truth)
