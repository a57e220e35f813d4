"""Under `weights` whole GPT models train as stock TP = 1 does: losses, norms, every gradient, every parameter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hp_plugin import cpu_backend
from hp_plugin.config import HeadDimConfig
from tests.dist.gpt import Case, build, start, train
from tests.dist.gpt_parts import assemble
from tests.dist.test_gpt_on_grid import check_trains_as_stock
from tests.ranks import Ranks


def on(m: int, n: int, micro_batch: int = 4, order: str = "dim-innermost", **fields: Any) -> Case:
    return Case(grid=HeadDimConfig(m, n, "weights", order), tp=m * n, micro_batch=micro_batch, **fields)


SWIGLU = {"gated_linear_unit": True, "add_bias_linear": False, "normalization": "RMSNorm"}
SP = {"sequence_parallel": True}


def full(**fields: Any) -> dict[str, Any]:
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1, **fields}


CASES = {
    "2x2": on(2, 2),
    "1x4": on(1, 4),
    "4x1": on(4, 1, model={"num_query_groups": 4}),
    "one key/value head": on(1, 4, model={"num_query_groups": 1}),
    "SwiGLU with biases": on(2, 2, model={"gated_linear_unit": True}),
    "SwiGLU RMSNorm QK-norm": on(2, 2, model=SWIGLU | {"qk_layernorm": True}),
    "output gate": on(2, 2, model={"attention_output_gate": True, "add_qkv_bias": True}),
    "learned positions": on(2, 2, positions="learned_absolute", model={"add_bias_linear": False}),
    "ends as stock's": on(2, 2, ends=False, tied=False),
    "ends as stock's, SP": on(2, 2, ends=False, model=SP),
    "ends as stock's, PP=2": on(1, 2, 2, pp=2, ends=False),
    "ends as stock's, tokens SP": on(2, 2, 1, ends=False, model=SP),
    "untied, learned positions": on(2, 2, tied=False, positions="learned_absolute", model={"add_bias_linear": False}),
    "SP, untied, learned positions": on(
        2, 2, tied=False, positions="learned_absolute", model=SP | {"add_bias_linear": False}
    ),
    "masks of their own": on(2, 2, own_masks=True),
    "SP": on(2, 2, model=SP),
    "SP on 1x4, QK-norm": on(1, 4, model=SP | {"qk_layernorm": True}),
    "SP SwiGLU, clipped": on(2, 2, clip_grad=0.5, model=SP | SWIGLU),
    "recompute layers": on(2, 2, model=full()),
    "recompute layers by twos, SP": on(2, 2, model=full(recompute_num_layers=2) | SP),
    "recompute layers by fours": on(1, 4, model=full(recompute_num_layers=4)),
    "recompute some layers": on(2, 2, model=full(recompute_method="block", recompute_num_layers=2)),
    "recompute attention": on(2, 2, model={"recompute_granularity": "selective"}),
    "recompute MLP": on(
        2, 2, model=SWIGLU | {"recompute_granularity": "selective", "recompute_modules": ["mlp", "core_attn"]}
    ),
    "recompute MLP with biases": on(
        2, 2, model={"recompute_granularity": "selective", "recompute_modules": ["mlp", "core_attn"]}
    ),
    "head-innermost": on(2, 2, order="head-innermost", model={"gated_linear_unit": True}),
    "head-innermost SP": on(2, 2, order="head-innermost", model=SP),
    "head-innermost tokens SP": on(2, 2, 1, order="head-innermost", model=SP),
    "PP=2": on(1, 2, 2, pp=2),
    "PP=2 interleaved": on(1, 2, 2, pp=2, vp=2),
    "PP=2 interleaved SP": on(1, 2, 2, pp=2, vp=2, model=SP | full()),
    "DP=2": on(1, 2, 2),
    "distributed optimizer DP=2": on(1, 2, 2, distributed_optimizer=True),
    # Buckets of less than a layer: at a layer's start the next one's weights are still to come from the optimizer.
    "overlapped distributed optimizer DP=2 clipped": on(
        1, 2, 2, distributed_optimizer=True, overlap=True, bucket_size=1000, clip_grad=0.5
    ),
    "overlapped gradients DP=2": on(1, 2, 2, overlap=True, bucket_size=1000),
    "tokens": on(2, 2, 1),
    "tokens on 1x4, QK-norm": on(1, 4, 2, model={"qk_layernorm": True}),
    "tokens SP SwiGLU QK-norm": on(2, 2, 1, model=SP | SWIGLU | {"qk_layernorm": True}),
    "tokens SP on 1x4, output gate": on(1, 4, 1, model=SP | {"attention_output_gate": True}),
    "tokens, masks of their own": on(2, 2, 1, own_masks=True),
    "tokens recompute layers": on(2, 2, 1, model=full()),
    "tokens SP recompute layers": on(2, 2, 1, model=SP | full()),
    "tokens recompute attention": on(2, 2, 1, model={"recompute_granularity": "selective"}),
    "tokens PP=2 interleaved SP": on(1, 2, 1, pp=2, vp=2, model=SP),
    "tokens, overlapped distributed optimizer DP=2": on(1, 2, 1, distributed_optimizer=True, overlap=True),
    "2x2 PP=2 interleaved SP on 8 ranks": on(2, 2, pp=2, vp=2, model=SP),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_trains_as_stock_on_one_rank(ranks: Ranks, case: Case) -> None:
    check_trains_as_stock(ranks, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("micro_batch", [4, 1], ids=["samples", "tokens"])
def test_half_precision_is_as_near_to_fp32_as_stock(ranks: Ranks, dtype: torch.dtype, micro_batch: int) -> None:
    half = {"dtype": dtype, "steps": 1, "loss_scale": 1024.0 if dtype is torch.float16 else None}
    (exact,) = ranks.run(1, train, Case(steps=1))
    (stock,) = ranks.run(1, train, Case(**half))
    found = ranks.run(4, train, on(2, 2, micro_batch, distributed_optimizer=True, **half))
    whole = assemble([outcome.grads for outcome in found], 4)
    scale = half["loss_scale"] or 1.0

    def error(grads: dict[str, Tensor]) -> float:
        parts = [(grads[name] / scale - value, value) for name, (value, _, _) in exact.grads.items()]
        return float(sum((off**2).sum() for off, _ in parts) / sum((value**2).sum() for _, value in parts)) ** 0.5

    # The dim axis adds two gradients that were rounded to half precision, where stock rounds their sum once.
    assert error(whole) < 1.5 * error({name: value for name, (value, _, _) in stock.grads.items()})
    assert found[0].losses[0] == pytest.approx(exact.losses[0], rel=2 * 2**-8)


DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}


@pytest.mark.parametrize("model", [{}, SP], ids=["", "SP"])
@pytest.mark.parametrize("micro_batch", [4, 1], ids=["samples", "tokens"])
def test_dropout_keeps_replicas_equal_and_recomputes_its_masks(
    ranks: Ranks, micro_batch: int, model: dict[str, Any]
) -> None:
    found = ranks.run(4, train, on(2, 2, micro_batch, model=DROPOUT | model))
    dry = ranks.run(4, train, on(2, 2, micro_batch, model=model))
    assert found[0].losses != dry[0].losses
    # Raises where a replicated parameter differs between the ranks that hold it.
    whole = assemble([outcome.grads for outcome in found], 4)
    again = ranks.run(4, train, on(2, 2, micro_batch, model=full(**DROPOUT, **model)))
    assert again[0].losses[0] == pytest.approx(found[0].losses[0], rel=1e-6)
    for name, tensor in assemble([outcome.grads for outcome in again], 4).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-6, msg=lambda said, name=name: name + said)


def outputs_of_equal_samples(dropout: dict[str, Any]) -> Tensor:
    """What the first layer's share is behind it, of a micro-batch of four times the same sample."""
    cpu_backend.enable()
    case = on(2, 2, ends=False, model=dropout)
    start(case)
    (chunk,) = build(case)
    layer = chunk.module.decoder.layers[0]
    sample = torch.randn(16, 1, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    with torch.no_grad():
        return layer(sample.expand(-1, 4, -1).contiguous(), mask)[0]


@pytest.mark.parametrize("dropout", [{"hidden_dropout": 0.5}, {"attention_dropout": 0.5}, DROPOUT], ids=str)
def test_ranks_with_other_tokens_drop_others(ranks: Ranks, dropout: dict[str, Any]) -> None:
    one, two, below_one, below_two = ranks.run(4, outputs_of_equal_samples, dropout)
    # Ranks 0 and 2 are a head group, which holds the same tokens; 0 and 1 a dim group, which does not.
    assert torch.equal(one, below_one) and torch.equal(two, below_two)
    assert not torch.isclose(one, two).all()
    assert not torch.isclose(one[:, 0], one[:, 1]).all()
