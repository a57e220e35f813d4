"""Half precision, dropout, recompute, another backend, refusals, and the bytes on the wire."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from hp_plugin import cpu_backend
from hp_plugin.attention.registration import initialize_head_dim_parallel
from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.rules import RULES
from hp_plugin.exchange.scores.attention import ScoresSettings, scores_attention
from hp_plugin.exchange.shapes import attention_shape
from hp_plugin.grid.groups import HeadDimGroups
from tests.dist import attention_cases
from tests.dist.attention_cases import Case
from tests.ranks import Ranks, prepare_device

EXACT = ("batch", "sequence", "scores")


# --- half precision -------------------------------------------------------------------------------------------------


def half_errors(case: Case) -> dict[str, tuple[float, float]]:
    """(error of stock, error of the grid) in half precision, both against fp32 on the same rounded parameters."""
    cpu_backend.enable()
    stock = attention_cases.reference(case)
    full = attention_cases.reference(case, torch.float32)
    module, grid = attention_cases.on_grid(case, stock)
    errors = {}
    for name, pick in (("output", "output"), ("input", "grad_input")):
        errors[name] = tuple(attention_cases.relative(getattr(r, pick), getattr(full, pick)) for r in (stock, grid))
    for name, gradient in grid.grads.items():
        if "layernorm" in name:
            dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
        exact = attention_cases.share(case, module, name, full.grads[name])
        errors[name] = (
            attention_cases.relative(attention_cases.share(case, module, name, stock.grads[name]), exact),
            attention_cases.relative(gradient, exact),
        )
    parallel_state.destroy_model_parallel()
    return errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exchange", EXACT)
def test_half_precision_is_as_good_as_stock(ranks: Ranks, exchange: str, dtype: torch.dtype) -> None:
    case = Case(2, 2, exchange, h=4, g=2, d=16, s=16, b=4, rope={}, dtype=dtype, config={"qk_layernorm": True})
    for errors in ranks.run(4, half_errors, case):
        for name, (stock, grid) in errors.items():
            # Stock rounds each output once. The grid adds a sum of partial scores or of partial gradients in the same
            # dtype: a few roundings more of the same size, never another order of magnitude.
            assert grid <= 4 * stock + 2 * torch.finfo(dtype).eps, (name, stock, grid)


# --- dropout and recompute ------------------------------------------------------------------------------------------


def dropout_masks(case: Case) -> tuple[tuple[int, int], Tensor]:
    """What is left of each row's probability mass: equal slices mean equal masks."""
    prepare_device()
    initialize_head_dim_parallel(HeadDimConfig(case.m, case.n, case.exchange))
    module = attention_cases.build(case, HeadDimConfig(case.m, case.n, case.exchange), case.h, case.g, case.d)
    generator = torch.Generator().manual_seed(3)
    width = case.d // case.n
    query, key = (torch.randn(case.s, case.b, heads, width, generator=generator).cuda() for heads in _heads(case))
    masses = module.core_attention(query, key, torch.ones_like(key), None)
    coordinates = module.groups.coordinates
    parallel_state.destroy_model_parallel()
    return coordinates, masses.view(case.s, case.b, -1, width)[..., 0].detach().cpu()


def _heads(case: Case) -> tuple[int, int]:
    return case.h // case.m, case.g // case.m


def test_scores_drops_the_same_on_a_dim_group_and_differently_on_a_head_group(ranks: Ranks) -> None:
    case = Case(2, 2, "scores", d=8, s=40, b=2, config={"attention_dropout": 0.3})
    masses = dict(ranks.run(4, dropout_masks, case))
    for i in (0, 1):
        torch.testing.assert_close(masses[i, 0], masses[i, 1], rtol=0, atol=0)
    assert not torch.equal(masses[0, 0], masses[1, 0])
    assert not torch.equal(masses[0, 0], torch.ones_like(masses[0, 0]))
    assert abs(masses[0, 0].mean().item() - 1.0) < 0.05, "dropout keeps the mass on average"


def dropout_against_dense(block: int) -> float:
    """Gradients of `scores_attention` with dropout against dense fp64 attention with the very same mask."""
    s, b, h, g, width = 11, 2, 4, 2, 12
    group, size = dist.group.WORLD, dist.get_world_size()
    generator = torch.Generator().manual_seed(8)
    query, key, value, grad = (torch.randn(s, b, heads, width * size, generator=generator) for heads in (h, g, g, h))
    own = slice(dist.get_rank() * width, (dist.get_rank() + 1) * width)
    state = torch.Generator().manual_seed(21).get_state()
    settings = ScoresSettings(group, True, None, 0.3, 0.4, state, block)
    inputs = [tensor[..., own].clone().requires_grad_() for tensor in (query, key, value)]

    def attend(values: Tensor) -> Tensor:
        torch.set_rng_state(state)
        return scores_attention(inputs[0], inputs[1], values, None, settings)

    # With unit vectors for values the output is the dropped-out probabilities themselves.
    units = torch.eye(s, width).view(s, 1, 1, width).expand(s, b, g, width)
    dropped = attend(units).detach().view(s, b, h, width)[..., :s].permute(1, 2, 0, 3).double()
    attend(inputs[2]).backward(grad[..., own].flatten(2))

    dense = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in dense)
    k, v = k.repeat_interleave(h // g, 1), v.repeat_interleave(h // g, 1)
    hidden = torch.ones(s, s, dtype=torch.bool).triu(1)
    probabilities = (0.3 * q @ k.transpose(2, 3)).masked_fill(hidden, -torch.inf).softmax(-1)
    kept = torch.where(dropped > 0, 1 / 0.6, 0.0)
    torch.testing.assert_close((probabilities * kept).detach(), dropped, rtol=1e-5, atol=1e-6)
    (probabilities * kept @ v).backward(grad.permute(1, 2, 0, 3).double())
    return max(
        attention_cases.relative(mine.grad, whole.grad[..., own]) for mine, whole in zip(inputs, dense, strict=True)
    )


@pytest.mark.parametrize("block", [4, 64])
def test_scores_dropout_gradients(ranks: Ranks, block: int) -> None:
    assert max(ranks.run(3, dropout_against_dense, block)) < 1e-5


def recomputed(case: Case, how: str) -> list[Tensor]:
    """Output, input gradient and parameter gradients, with dropout, under a kind of recompute."""
    cpu_backend.enable()
    head_dim = HeadDimConfig(case.m, case.n, case.exchange)
    initialize_head_dim_parallel(head_dim)
    extra = {"recompute_granularity": "selective"} if how == "selective" else {}
    case = Case(**{**case.__dict__, "config": {**case.config, **extra}})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*local is another function", category=UserWarning)
        module = attention_cases.build(case, head_dim, case.h, case.g, case.d)
    model_parallel_cuda_manual_seed(77)
    torch.manual_seed(5)
    inputs, weights = attention_cases.data(case)
    inputs.requires_grad_()
    rope = attention_cases.angles(case, case.d)

    def attend(states: Tensor) -> Tensor:
        output, bias = module(states, None, rotary_pos_emb=rope)
        return output + bias

    output = tensor_parallel.checkpoint(attend, False, inputs) if how == "full" else attend(inputs)
    (output * weights).sum().backward()
    found = [output.detach(), inputs.grad, *(p.grad for p in module.parameters())]
    parallel_state.destroy_model_parallel()
    return [tensor.clone() for tensor in found]


@pytest.mark.parametrize("exchange", [*EXACT, "local"])
def test_recompute_restores_dropout(ranks: Ranks, exchange: str) -> None:
    case = Case(2, 2, exchange, s=16, d=16, rope={}, config={"attention_dropout": 0.25})
    plain, again = ranks.run(4, recomputed, case, "none"), ranks.run(4, recomputed, case, "none")
    dry = ranks.run(4, recomputed, Case(**{**case.__dict__, "config": {"attention_dropout": 0.0}}), "none")
    assert not torch.equal(plain[0][0], dry[0][0]), "dropout did nothing"
    for how in ("selective", "full"):
        for expected, same, found in zip(plain, again, ranks.run(4, recomputed, case, how), strict=True):
            for tensor, repeat, other in zip(expected, same, found, strict=True):
                torch.testing.assert_close(repeat, tensor, rtol=0, atol=0)
                torch.testing.assert_close(other, tensor, rtol=1e-5, atol=1e-6)


# --- one class body over any backend --------------------------------------------------------------------------------


class PlainColumn(nn.Module):
    """The least a column-parallel linear can be, from torch and two mappings."""

    def __init__(self, input_size: int, output_size: int, *, init_method: Any, bias: bool, tp_group: Any, **_: Any):
        super().__init__()
        self.group = tp_group
        self.weight = nn.Parameter(torch.empty(output_size // tp_group.size(), input_size))
        self.bias = nn.Parameter(torch.zeros(output_size // tp_group.size())) if bias else None
        whole = torch.empty(output_size, input_size)
        init_method(whole)
        self.weight.data.copy_(whole.chunk(tp_group.size())[tp_group.rank()])

    def forward(self, states: Tensor) -> tuple[Tensor, None]:
        return F.linear(copy_to_tensor_model_parallel_region(states, self.group), self.weight, self.bias), None


class PlainRow(nn.Module):
    """The least a row-parallel linear can be."""

    def __init__(self, input_size: int, output_size: int, *, init_method: Any, bias: bool, tp_group: Any, **_: Any):
        super().__init__()
        self.group = tp_group
        self.weight = nn.Parameter(torch.empty(output_size, input_size // tp_group.size()))
        self.bias = nn.Parameter(torch.zeros(output_size)) if bias else None
        whole = torch.empty(output_size, input_size)
        init_method(whole)
        self.weight.data.copy_(whole.chunk(tp_group.size(), dim=1)[tp_group.rank()])

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        return reduce_from_tensor_model_parallel_region(F.linear(states, self.weight), self.group), self.bias


def on_plain_backend(case: Case) -> dict[str, float]:
    real = attention_cases.get_gpt_layer_local_spec

    def plain_spec(*args: Any, **kwargs: Any) -> Any:
        spec = real(*args, **kwargs)
        spec.submodules.self_attention.submodules.linear_qkv = PlainColumn
        spec.submodules.self_attention.submodules.linear_proj = PlainRow
        return spec

    attention_cases.get_gpt_layer_local_spec = plain_spec
    try:
        return attention_cases.differences(case)
    finally:
        attention_cases.get_gpt_layer_local_spec = real


@pytest.mark.parametrize("exchange", EXACT)
def test_the_layer_types_wrap_a_backend_they_never_saw(ranks: Ranks, exchange: str) -> None:
    for found in ranks.run(4, on_plain_backend, Case(2, 2, exchange, rope={})):
        assert max(found.values()) < 1e-5, found


# --- bytes ----------------------------------------------------------------------------------------------------------


def counted(case: Case) -> tuple[float, float, float, float]:
    """Elements received from the dim group: (forward, its closed form, backward, its closed form)."""
    cpu_backend.enable()
    head_dim = HeadDimConfig(case.m, case.n, case.exchange)
    initialize_head_dim_parallel(head_dim)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*local is another function", category=UserWarning)
        module = attention_cases.build(case, head_dim, case.h, case.g, case.d)
    groups = HeadDimGroups.from_collection(None)
    received = 0.0

    def counting(call: Callable[..., Any], elements: Callable[..., float]) -> Callable[..., Any]:
        def wrapped(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            nonlocal received
            if group is groups.dim:
                received += elements(*args, **kwargs)
            return call(*args, group=group, **kwargs)

        return wrapped

    def traded(output: Tensor, _: Tensor, output_split_sizes: list[int] | None = None, **__: Any) -> float:
        if output_split_sizes is None:
            return output.numel() * (case.n - 1) / case.n
        own = output_split_sizes[groups.dim.rank()]
        return output.numel() * (1 - own / max(1, sum(output_split_sizes)))

    def reduced(tensor: Tensor, **_: Any) -> float:
        return 2 * (case.n - 1) / case.n * tensor.numel()

    stock = dist.all_to_all_single, dist.all_reduce
    dist.all_to_all_single, dist.all_reduce = counting(stock[0], traded), counting(stock[1], reduced)
    try:
        inputs, weights = attention_cases.data(case)
        rope = attention_cases.angles(case, case.d)
        output, _ = module(inputs.requires_grad_(), attention_cases.attention_mask(case), rotary_pos_emb=rope)
        forward, received = received, 0.0
        (output * weights).sum().backward()
    finally:
        dist.all_to_all_single, dist.all_reduce = stock
    shape = attention_shape(module.true_config, head_dim, case.b, case.s, 0 if rope is None else rope.shape[-1])
    rule = RULES[case.exchange]
    parallel_state.destroy_model_parallel()
    return forward, rule.elements(shape), received, rule.elements_backward(shape)


COUNTED = [
    Case(m, n, exchange, h=12, g=6, d=24, s=18, b=6, **extra)
    for (m, n), exchange, extra in itertools.product(
        [(1, 3), (2, 3), (3, 2)],
        [*EXACT, "local"],
        [{}, {"rope": {}}, {"config": {"attention_output_gate": True}}, {"config": {"qk_layernorm": True}}],
    )
    if not (exchange == "sequence" and 18 % (2 * n))
]


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.label)
def test_bytes_on_the_wire_equal_the_closed_form(ranks: Ranks, case: Case) -> None:
    results = ranks.run(case.m * case.n, counted, case)
    forward, expected, backward, expected_backward = (sum(column) for column in zip(*results, strict=True))
    assert forward == pytest.approx(expected, rel=1e-9)
    assert backward == pytest.approx(expected_backward, rel=1e-9)
    assert (forward > 0) == (case.exchange != "local")


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(case: Case, forward: dict[str, Any] | None) -> str:
    cpu_backend.enable()
    head_dim = HeadDimConfig(case.m, case.n, case.exchange)
    initialize_head_dim_parallel(head_dim)
    try:
        module = attention_cases.build(case, head_dim, case.h, case.g, case.d)
        inputs, _ = attention_cases.data(case)
        module(inputs, attention_cases.attention_mask(case), **(forward or {}))
    except (ValueError, RuntimeError) as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return "nothing"


@pytest.mark.parametrize(
    ("case", "forward", "message"),
    [
        (Case(2, 2, "batch", b=3), None, "`batch` needs a micro-batch size divisible by n: 3 % 2 = 1"),
        (Case(2, 2, "scores", config={"softmax_type": "off-by-one"}), None, "`scores` cannot do a softmax offset"),
        (Case(2, 2, "sequence", config={"softmax_type": "off-by-one"}), None, "`sequence` cannot do a softmax offset"),
        *((Case(2, 2, name, config={"softmax_type": "learnable"}), None, "learnable softmax offset") for name in RULES),
        (
            Case(2, 2, "local", config={"yarn_rotary_scaling_factor": 4.0}),
            None,
            "`local` cannot place YaRN frequencies",
        ),
        (Case(2, 2, "batch"), {"packed_seq_params": object()}, "packed sequences cannot be split"),
        (Case(2, 2, "sequence"), {"attention_bias": torch.zeros(1)}, "`sequence` cannot add an attention bias"),
        (Case(2, 2, "scores", config={"qk_clip": True}), None, "QK-clip"),
        (Case(2, 2, "scores", d=6, rope={"rotary_interleaved": True}), "rope", "even slice"),
    ],
    ids=lambda value: value.label if isinstance(value, Case) else None,
)
def test_what_would_be_wrong_is_refused(ranks: Ranks, case: Case, forward: Any, message: str) -> None:
    if forward == "rope":
        forward = {"rotary_pos_emb": torch.zeros(case.s, 1, 1, case.d)}
    for said in ranks.run(4, refused, case, forward):
        assert message in said


def local_warnings() -> list[str]:
    cpu_backend.enable()
    initialize_head_dim_parallel(HeadDimConfig(2, 2, "local"))
    case = Case(2, 2, "local", h=6, g=2, d=24)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            attention_cases.build(case, HeadDimConfig(2, 2, "local"), case.h, case.g, case.d)
    parallel_state.destroy_model_parallel()
    return [str(warning.message) for warning in caught if "another function" in str(warning.message)]


def test_local_says_once_that_it_is_another_function(ranks: Ranks) -> None:
    for said in ranks.run(4, local_warnings):
        assert len(said) == 1
        assert "attention with 12 heads and 4 query groups of 12 channels instead of 6, 2 and 24" in said[0]
