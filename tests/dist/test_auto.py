"""Under `auto` models train as stock TP = 1 does, whatever moves, and send no more than under any one exchange."""

import contextlib
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_layer import TransformerLayer

from hp_plugin import cpu_backend
from hp_plugin.attention.specs import head_dim_spec
from hp_plugin.attention.transformer_config import HeadDimTransformerConfig
from hp_plugin.compare.ranks.traffic import counted
from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.weights.choice import Choice
from hp_plugin.refusal import RefusedError
from tests.dist.gpt import SEQUENCE, Case, Outcome, build, evaluate, run_step, start, train
from tests.dist.gpt_parts import assemble, collect
from tests.dist.test_gpt_on_grid import agrees, stock_case
from tests.ranks import Ranks

Chosen = set[tuple[bool, bool]]
"""(training, weights moved)."""
SP = {"sequence_parallel": True}
SWIGLU = {"gated_linear_unit": True, "add_bias_linear": False, "normalization": "RMSNorm"}
TRAINED, KEPT, READ, LOOKED = (True, True), (True, False), (False, True), (False, False)


def on(m: int, n: int, micro_batch: int = 2, **fields: Any) -> Case:
    return Case(grid=HeadDimConfig(m, n, "auto"), tp=m * n, micro_batch=micro_batch, **fields)


def full(**fields: Any) -> dict[str, Any]:
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1, **fields}


def selective(*modules: str, **fields: Any) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules), **fields}


def train_watched(case: Case) -> tuple[Outcome, Chosen]:
    """What a rank saw, and what it chose."""
    chosen: Chosen = set()
    original = Choice.gathers

    def watched(self: Choice, s: int, b: int, training: bool, *rest: Any, **more: Any) -> bool:
        gathers = original(self, s, b, training, *rest, **more)
        chosen.add((training, gathers))
        return gathers

    Choice.gathers = watched  # type: ignore[method-assign]
    try:
        return train(case), chosen
    finally:
        Choice.gathers = original  # type: ignore[method-assign]


# Tokens of a micro-batch decide: a sample has 16. Of 4 samples weights move on 2x2, of one or two activations do;
# forward-only passes move weights from 2 samples on.
MIXED = (4, 2, 1, 1)
CASES: dict[str, tuple[Case, Chosen]] = {
    "weights": (on(2, 2, 4), {TRAINED}),
    "activations": (on(2, 2, 2), {KEPT}),
    "activations on 1x4, QK-norm": (on(1, 4, 2, model={"qk_layernorm": True}), {KEPT}),
    "activations SP": (on(2, 2, 1, model=SP | SWIGLU), {KEPT}),
    "mixed sizes": (on(2, 2, batches=MIXED), {TRAINED, KEPT}),
    "mixed sizes on 1x4": (on(1, 4, 8, batches=(5, 3)), {TRAINED, KEPT}),
    "mixed sizes, ends as stock's": (on(2, 2, 8, batches=(2, 6), ends=False, tied=False), {TRAINED, KEPT}),
    "mixed sizes, learned positions, untied": (
        on(2, 2, batches=MIXED, tied=False, positions="learned_absolute", model={"add_bias_linear": False}),
        {TRAINED, KEPT},
    ),
    "mixed sizes, SP QK-norm": (on(2, 2, batches=MIXED, model=SP | {"qk_layernorm": True}), {TRAINED, KEPT}),
    "mixed sizes, SwiGLU, output gate, masks of their own": (
        on(2, 2, batches=MIXED, own_masks=True, model=SWIGLU | {"attention_output_gate": True}),
        {TRAINED, KEPT},
    ),
    "mixed sizes, recompute layers": (on(2, 2, batches=MIXED, model=full()), {TRAINED, KEPT}),
    "mixed sizes, recompute layers by twos, SP": (
        on(2, 2, batches=MIXED, model=full(recompute_num_layers=2) | SP),
        {TRAINED, KEPT},
    ),
    "mixed sizes, recompute MLPs and attention": (
        on(2, 2, batches=MIXED, model=selective("mlp", "core_attn")),
        {TRAINED, KEPT},
    ),
    "mixed sizes, recompute norms": (on(2, 2, batches=MIXED, model=selective("layernorm")), {TRAINED, KEPT}),
    # Passes of both kinds are on their way at once, in each other's backward.
    "mixed sizes PP=2": (on(1, 2, 4, pp=2, batches=(6, 1, 1)), {TRAINED, KEPT}),
    "mixed sizes PP=2, recompute layers": (on(1, 2, 4, pp=2, batches=(6, 1, 1), model=full()), {TRAINED, KEPT}),
    "mixed sizes PP=2, recompute MLPs and attention, SP": (
        on(1, 2, 4, pp=2, batches=(2, 6), model=selective("mlp", "core_attn") | SP),
        {TRAINED, KEPT},
    ),
    "mixed sizes PP=2 interleaved SP, recompute layers": (
        on(1, 2, 4, pp=2, vp=2, batches=(2, 4, 1, 1), model=SP | full()),
        {TRAINED, KEPT},
    ),
    "evaluation between steps": (on(2, 2, 2, evaluate=True), {KEPT, READ}),
    "evaluation between steps, SP, tokens": (on(2, 2, 1, evaluate=True, model=SP), {KEPT, LOOKED}),
    "evaluation between steps, recompute layers": (on(2, 2, 2, evaluate=True, model=full()), {TRAINED, READ}),
    "evaluation between mixed sizes, overlapped distributed optimizer DP=2 clipped": (
        on(1, 2, 4, batches=(3, 1), evaluate=True, steps=3, distributed_optimizer=True, overlap=True, bucket_size=1000),
        {KEPT, READ},
    ),
}


@pytest.mark.parametrize(("case", "expected"), CASES.values(), ids=CASES.keys())
def test_trains_as_stock_on_one_rank(ranks: Ranks, case: Case, expected: Chosen) -> None:
    world = max(4, case.tp * case.pp)
    batches = case.batches * (world // (case.tp * case.pp))
    alone = replace(stock_case(case), batches=batches, evaluate=case.evaluate, steps=case.steps)
    (stock,) = ranks.run(1, train, alone)
    found = ranks.run(world, train_watched, case)
    assert all(chosen == expected for _, chosen in found), found[0][1]
    agrees(case, stock, [outcome for outcome, _ in found])
    for outcome, _ in found:
        assert outcome.evaluations == pytest.approx(stock.evaluations, rel=1e-4)


def losses_of_both_inputs(case: Case) -> list[torch.Tensor]:
    """Losses of tokens, of hidden states that somebody else has embedded, and of tokens again."""
    cpu_backend.enable()
    start(case)
    (chunk,), (other,) = build(case), build(replace(case, ends=False))
    tokens = torch.randint(64, (case.micro_batch, SEQUENCE + 1), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(SEQUENCE).expand(case.micro_batch, -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    labels, tokens = tokens[:, 1:], tokens[:, :-1]
    states = other.module.embedding(tokens, positions)
    return [
        chunk(tokens, positions, mask, decoder_input=given, labels=labels).detach() for given in (None, states, None)
    ]


@pytest.mark.parametrize("model", [{}, SP], ids=["", "SP"])
def test_hidden_states_may_come_from_elsewhere(ranks: Ranks, model: dict[str, Any]) -> None:
    for first, given, again in ranks.run(4, losses_of_both_inputs, on(2, 2, 4, model=model)):
        torch.testing.assert_close(given, first, rtol=1e-5, atol=1e-6)
        assert torch.equal(again, first)


def attention_by_itself(case: Case) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Output, gradients of the input and of both weights, of one layer's attention outside a pass of its model."""
    cpu_backend.enable()
    start(case)
    chunks = build(case)
    random = torch.Generator().manual_seed(5)
    states = torch.randn(SEQUENCE, case.micro_batch, 32, generator=random, requires_grad=True)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    output, bias = chunks[0].module.decoder.layers[0].self_attention(states, mask)
    (torch.randn(output.shape, generator=random) * output).sum().backward()
    assert states.grad is not None
    found = collect(chunks, lambda parameter: parameter.main_grad)
    names = [f"layer 0 self_attention.linear_{which}.weight" for which in ("qkv", "proj")]
    weights = {name: found[name] for name in names}
    return output.detach() + bias.detach(), states.grad, weights


@pytest.mark.parametrize("grid", [(2, 2), (1, 4)], ids=str)
def test_attention_may_be_called_without_its_model(ranks: Ranks, grid: tuple[int, int]) -> None:
    case = on(*grid)
    ((output, gradient, weights),) = ranks.run(1, attention_by_itself, stock_case(case))
    found = ranks.run(4, attention_by_itself, case)
    for own_output, own_gradient, _ in found:
        torch.testing.assert_close(own_output, output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own_gradient, gradient, rtol=1e-5, atol=1e-5)
    stock, whole = assemble([weights], 1), assemble([parts for *_, parts in found], 4)
    for name in stock:
        torch.testing.assert_close(whole[name], stock[name], rtol=1e-5, atol=1e-4)


FIXED = ("batch", "sequence", "scores", "weights")
MAP = {
    "2x2": on(2, 2),
    "2x2 SP": on(2, 2, model=SP),
    "2x2 SwiGLU, untied": on(2, 2, tied=False, model=SWIGLU),
    "1x4": on(1, 4),
    "1x4 SP QK-norm": on(1, 4, model=SP | {"qk_layernorm": True}),
}


def sent(case: Case) -> dict[tuple[int, str], dict[str, float]]:
    """Bytes that this rank sent within its TP group, by samples of a micro-batch and kind of step, and by exchange."""
    cpu_backend.enable()
    start(case)
    found: dict[tuple[int, str], dict[str, float]] = {}
    for b in (1, 2, 4, 8):
        for exchange in (*FIXED, "auto"):
            sizes = {"micro_batch_size": b, "seq_length": SEQUENCE}
            one = replace(case.but(**sizes), micro_batch=b, grid=case.grid.with_exchange(exchange))
            try:
                chunks = build(one)
            except RefusedError:
                assert exchange == "batch" and b % case.grid.n
                continue
            for kind, run in (("train", run_step), ("forward", evaluate)):
                with counted() as traffic:
                    run(one, chunks, 0)
                total = sum(call.sent for call in traffic.calls if call.axis in ("tp", "head", "dim"))
                found.setdefault((b, kind), {})[exchange] = total
    return found


# Each takes as long as a file of tests; the first two show most.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] * (number > 1))
        for number, (name, case) in enumerate(MAP.items())
    ],
)
def test_it_sends_no_more_than_the_best_fixed_exchange(ranks: Ranks, case: Case) -> None:
    """Recorded, over a map of 40 shapes: five kinds of layers, four sizes of micro-batches, both kinds of steps."""
    found = ranks.run(4, sent, case)
    best = set()
    for shape in found[0]:
        # Of all ranks: under sequence parallelism they differ in which tokens are theirs already.
        totals = {name: sum(one[shape][name] for one in found) for name in found[0][shape]}
        auto = totals.pop("auto")
        best.add(min(totals, key=lambda name: totals[name]))
        assert auto <= 1.03 * min(totals.values()), (shape, totals, auto)
    assert len(found[0]) == 8 and len(best) > 1


def said(case: Case) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        train(case)
    return text.getvalue()


def test_it_says_once_what_it_chose_and_why(ranks: Ranks) -> None:
    first, *others = ranks.run(4, said, on(2, 2, evaluate=True, steps=2))
    lines = [line for line in first.splitlines() if "auto" in line]
    assert lines == [
        " > --head-dim-exchange auto: forward-only passes of 2 x 16 tokens move weights; a rank sends per micro-batch: "
        "weights 0.05 MB, batch 0.06 MB, sequence 0.06 MB, scores 0.07 MB",
        " > --head-dim-exchange auto: training passes of 2 x 16 tokens move activations (`batch`); a rank sends per "
        "micro-batch: batch 0.11 MB, sequence 0.11 MB, weights 0.12 MB, scores 0.16 MB",
    ]
    assert not any("auto" in text for text in others)


def config(**fields: Any) -> HeadDimTransformerConfig:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "add_bias_linear": False}
    return HeadDimTransformerConfig(**{**sizes, "head_dim_parallel": HeadDimConfig(2, 2), **fields})


def exchanges_of(initialized: bool, linear: type | None = None, **fields: Any) -> tuple[bool, tuple[str, ...]]:
    """Whether layers know of the choice, and what attention may choose."""
    cpu_backend.enable()
    if initialized:
        start(on(2, 2))
    stock = get_gpt_layer_local_spec()
    if linear is not None:
        stock.submodules.mlp.submodules.linear_fc1 = linear
    made = head_dim_spec(stock, config(**fields))
    layer = next(iter(getattr(made, "layer_specs", [made])))
    return layer.module is not TransformerLayer, layer.submodules.self_attention.params["exchanges"]


SAVED = {
    "distribute_saved_activations": True,
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
LYING = (False, ("batch", "sequence", "scores"))


def test_layers_that_cannot_gather_are_left_to_the_others(ranks: Ranks) -> None:
    assert set(ranks.run(4, exchanges_of, True)) == {(True, ("batch", "sequence", "scores", "weights"))}
    # As Transformer Engine's linears have no place where a whole weight could come in.
    assert set(ranks.run(4, exchanges_of, True, torch.nn.Linear)) == {LYING}
    assert set(ranks.run(4, with_saved, True)) == {LYING}
    # Which layers are the ends of a stage is not known before there are stages.
    assert set(ranks.run(4, exchanges_of, False)) == {LYING}


def with_saved(initialized: bool) -> tuple[bool, tuple[str, ...]]:
    return exchanges_of(initialized, **SAVED)


def test_a_fixed_exchange_is_no_choice() -> None:
    fixed = Choice(config(head_dim_parallel=HeadDimConfig(2, 2, "weights")))
    assert fixed.gathers(16, 2, True) and not fixed.free
    with pytest.raises(ValueError, match="exchange `weights` always moves weights"):
        fixed.keep_weights()
    free = Choice(config())
    # Of single tokens beside a cache, and where weights are not to move, activations do, however many tokens there are.
    assert free.counted(2**16, 2, False, cache=2**16).name == "weights"
    assert not free.gathers(1, 2**17, False, cache=2**16)
    free.keep_weights()
    assert not free.gathers(2**16, 2, True) and not free.gathers(2**16, 2, False, cache=2**16)
