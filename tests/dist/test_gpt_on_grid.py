"""Whole GPT models on the grid train as stock TP = 1 does: losses, gradient norms, every gradient, every parameter."""

from typing import Any

import pytest
import torch

from hp_plugin.config import HeadDimConfig
from hp_plugin.grid.ranks import DIM_INNERMOST, HEAD_INNERMOST
from tests.dist.gpt import Case, Outcome, train
from tests.dist.gpt_parts import assemble
from tests.ranks import Ranks

# Sums of a few hundred fp32 products in another order, and Adam, which divides by small numbers, two steps long.
GRADIENT, PARAMETER = 2e-5, 2e-3


def on(m: int, n: int, exchange: str = "auto", order: str = DIM_INNERMOST, **fields: Any) -> Case:
    return Case(grid=HeadDimConfig(m, n, exchange, order), tp=m * n, **fields)


CASES = {
    "2x2": on(2, 2),
    "2x1 DP=2": on(2, 1),
    "2x2 sequence": on(2, 2, "sequence"),
    "2x2 head-innermost": on(
        2, 2, order=HEAD_INNERMOST, model={"gated_linear_unit": True, "attention_output_gate": True}
    ),
    "2x2 head-innermost SP scores": on(
        2, 2, "scores", order=HEAD_INNERMOST, model={"sequence_parallel": True, "qk_layernorm": True}
    ),
    "1x4 auto, batch of 2": on(1, 4),
    "1x4 scores": on(1, 4, "scores"),
    # Without RoPE a key bias shifts all scores of a query alike: its gradient is rounding, and Adam makes steps of it.
    "learned positions": on(2, 2, positions="learned_absolute", model={"add_bias_linear": False}),
    "no positions": on(2, 2, positions="none", model={"add_bias_linear": False}),
    "QK-norm": on(2, 2, model={"qk_layernorm": True}),
    "QK-norm scores": on(2, 2, "scores", model={"qk_layernorm": True, "normalization": "RMSNorm"}),
    "SP LayerNorm": on(2, 2, model={"sequence_parallel": True}),
    "SP RMSNorm QK-norm sequence": on(
        2, 2, "sequence", model={"sequence_parallel": True, "normalization": "RMSNorm", "qk_layernorm": True}
    ),
    "SP scores on 1x4": on(1, 4, "scores", model={"sequence_parallel": True, "qk_layernorm": True}),
    "SwiGLU without biases": on(2, 2, model={"gated_linear_unit": True, "add_bias_linear": False}),
    "output gate": on(2, 2, model={"attention_output_gate": True}),
    "recompute full": on(
        2, 2, model={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    ),
    "recompute selective": on(1, 4, "scores", model={"recompute_granularity": "selective"}),
    "PP=2": on(1, 2, pp=2),
    "PP=2 interleaved": on(1, 2, pp=2, vp=2),
    "PP=2 interleaved SP": on(1, 2, pp=2, vp=2, model={"sequence_parallel": True}),
    "distributed optimizer DP=2": on(1, 2, distributed_optimizer=True),
    "overlapped distributed optimizer DP=2 clipped": on(
        1, 2, "scores", distributed_optimizer=True, overlap=True, clip_grad=0.5
    ),
}


def stock_case(case: Case) -> Case:
    switched_off = {
        *("sequence_parallel", "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
    }
    model = {name: value for name, value in case.model.items() if name not in switched_off}
    return Case(
        positions=case.positions, clip_grad=case.clip_grad, tied=case.tied, own_masks=case.own_masks, model=model
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_trains_as_stock_on_one_rank(ranks: Ranks, case: Case) -> None:
    check_trains_as_stock(ranks, case)


def check_trains_as_stock(ranks: Ranks, case: Case) -> None:
    (stock,) = ranks.run(1, train, stock_case(case))
    agrees(case, stock, ranks.run(max(4, case.tp * case.pp), train, case))


def agrees(case: Case, stock: Outcome, found: list[Outcome]) -> None:
    """Fails where what the ranks of a grid saw is not what one stock rank did."""
    for outcome in found:
        assert outcome.losses[0] == pytest.approx(stock.losses[0], rel=1e-6)
        assert outcome.grad_norms[0] == pytest.approx(stock.grad_norms[0], rel=1e-5)
        # Behind a step of Adam, which makes whole steps of gradients that are rounding.
        assert outcome.losses == pytest.approx(stock.losses, rel=1e-4)
        assert outcome.grad_norms == pytest.approx(stock.grad_norms, rel=PARAMETER)
    for part, bound in (("grads", GRADIENT), ("params", PARAMETER)):
        if part == "grads" and case.distributed_optimizer:
            continue  # each rank has reduced its own share of them only; the parameters tell
        expected = assemble([getattr(stock, part)], 1)
        whole = assemble([getattr(outcome, part) for outcome in found], case.tp)
        assert whole.keys() == expected.keys()
        for name, tensor in expected.items():
            # Parameters as a whole: Adam takes a whole step, either way, for a single gradient that is rounding.
            order = float("inf") if part == "grads" else 2.0
            error = torch.linalg.vector_norm(whole[name] - tensor, order) / torch.linalg.vector_norm(tensor, order)
            assert error < bound, f"{part} of {name}: {error:.1e}"


@pytest.mark.parametrize("exchange", ["batch", "sequence", "scores"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_keeps_replicas_equal(ranks: Ranks, exchange: str, sequence_parallel: bool) -> None:
    model = {"hidden_dropout": 0.2, "attention_dropout": 0.2, "sequence_parallel": sequence_parallel}
    found = ranks.run(4, train, on(2, 2, exchange, model=model))
    dry = ranks.run(4, train, on(2, 2, exchange))
    assert found[0].losses != dry[0].losses
    assert all(torch.isfinite(torch.tensor(outcome.losses)).all() for outcome in found)
    # Raises where a replicated parameter differs between the ranks that hold it.
    assemble([outcome.params for outcome in found], 4)
