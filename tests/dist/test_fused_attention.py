"""Core attention on torch's fused kernels is stock's core attention: output and all gradients, whatever is asked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hp_plugin import cpu_backend
from hp_plugin.attention import fused_core
from hp_plugin.attention.fused_core import FusedDotProductAttention
from hp_plugin.exchange.fused_kernels import fused_attention
from hp_plugin.exchange.rules import RULES
from tests.dist import attention_cases
from tests.dist.attention_cases import Case
from tests.dist.training_runs import train
from tests.ranks import Ranks

FP32 = 1e-5


@dataclass(frozen=True)
class Core:
    """One call of core attention; `config` goes to TransformerConfig."""

    h: int = 4
    g: int = 2
    d: int = 6
    s: int = 11
    b: int = 3
    queries: int | None = None
    mask: str | None = None
    causal: bool = True
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        shape = f"h{self.h}g{self.g}d{self.d}s{self.s}b{self.b}"
        what = [self.mask, "all" if not self.causal else None, self.queries and f"{self.queries} queries"]
        return "-".join([shape, *(str(part) for part in what if part), *(f"{k}={v}" for k, v in self.config.items())])


CASES = [
    Core(),
    Core(g=4),
    Core(g=1, b=1),
    Core(h=6, g=3, d=5, s=7, b=2, causal=False),
    Core(d=512, s=9, b=2),
    Core(d=512, h=2, g=2, s=13, mask="arbitrary"),
    Core(d=257, h=3, g=1, s=6, b=1, config={"window_size": (2, 1)}),
    Core(scale=0.31),
    Core(config={"apply_query_key_layer_scaling": True}),
    Core(s=1),
    Core(queries=1),
    Core(queries=5, causal=False),
    Core(queries=5, config={"window_size": (3, 0)}),
    *(
        Core(mask=mask, causal=causal)
        for mask in ("padding", "arbitrary", "shared", "heads")
        for causal in (True, False)
    ),
    *(Core(g=g, mask=mask, b=1) for g in (1, 4) for mask in ("padding", "heads")),
    *(Core(config={"window_size": window}) for window in ((3, 0), (0, 0), (2, 3), (40, 0), (0, 4))),
    Core(mask="arbitrary", config={"window_size": (4, 0)}),
    # several blocks of queries, the last one short; windows as wide as a block and wider
    Core(s=530, b=1, h=2, g=1, config={"window_size": (6, 0)}),
    Core(s=530, b=1, h=2, g=2, config={"window_size": (255, 3)}),
    Core(s=700, b=1, h=2, g=1, config={"window_size": (300, 20)}),
    Core(s=530, queries=300, b=1, h=2, g=1, config={"window_size": (17, 0)}),
    Core(config={"window_size": (3, 0), "window_attn_skip_freq": [0, 1]}),
    Core(config={"softmax_type": "off-by-one"}),
]


def core(case: Core, kind: type[DotProductAttention], backend: AttnBackend) -> DotProductAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=case.h * case.d,
        num_attention_heads=case.h,
        num_query_groups=case.g,
        kv_channels=case.d,
        attention_backend=backend,
        bf16=case.dtype == torch.bfloat16,
        params_dtype=case.dtype,
        **{"attention_dropout": 0.0, "attention_softmax_in_fp32": True, "masked_softmax_fusion": False, **case.config},
    )
    kind_of_mask = AttnMaskType.causal if case.causal else AttnMaskType.arbitrary
    return kind(
        config=config, layer_number=1, attn_mask_type=kind_of_mask, attention_type="self", softmax_scale=case.scale
    )


def mask_of(case: Core) -> Tensor | None:
    """True where hidden; one query of `arbitrary` sees nothing."""
    if case.mask is None:
        return None
    generator = torch.Generator().manual_seed(7)
    if case.mask == "padding":
        lengths = torch.randint(1, case.s + 1, (case.b,), generator=generator)
        return (torch.arange(case.s) >= lengths[:, None])[:, None, None, :]
    samples = 1 if case.mask == "shared" else case.b
    heads = case.h if case.mask == "heads" else 1
    mask = torch.rand((samples, heads, case.s, case.s), generator=generator) < 0.4
    mask[0, 0, case.s // 2] = True
    return mask


def call(module: DotProductAttention, case: Core, seed: int = 3) -> tuple[Tensor, ...]:
    """Output, and the gradients of queries, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    queries = case.s if case.queries is None else case.queries
    shapes = ((queries, case.h), (case.s, case.g), (case.s, case.g), (queries, case.h))
    made = [torch.randn(length, case.b, heads, case.d, generator=generator) for length, heads in shapes]
    query, key, value, weights = (tensor.to(case.dtype) for tensor in made)
    # as stock's own split of a mixed projection leaves them: views with gaps
    key, value = torch.stack((key, value), dim=3).unbind(3)
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    model_parallel_cuda_manual_seed(seed)
    output = module(*inputs, mask_of(case), attn_mask_type=module.attn_mask_type)
    (output.float() * weights.flatten(2).float()).sum().backward()
    assert inputs[1].grad is not None
    return output.detach(), *(tensor.grad for tensor in inputs)


def errors(case: Core) -> list[float]:
    cpu_backend.enable()
    parallel_state.initialize_model_parallel()
    stock = call(core(case, DotProductAttention, AttnBackend.unfused), case)
    fused = call(core(case, FusedDotProductAttention, AttnBackend.fused), case)
    found = []
    for mine, theirs in zip(fused, stock, strict=True):
        if theirs.abs().max() == 0:  # a single key: nothing to choose
            assert mine.abs().max() < 1e-6
        else:
            found.append(attention_cases.relative(mine, theirs))
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_output_and_all_gradients_are_stocks(ranks: Ranks, case: Core) -> None:
    assert max(ranks.run(1, errors, case)[0]) < FP32


def errors_of_half(case: Core) -> list[tuple[float, float]]:
    """(stock's, the fused one's) against stock in fp32."""
    cpu_backend.enable()
    parallel_state.initialize_model_parallel()
    full = replace(case, dtype=torch.float32)
    exact = call(core(full, DotProductAttention, AttnBackend.unfused), full)
    stock = call(core(case, DotProductAttention, AttnBackend.unfused), case)
    fused = call(core(case, FusedDotProductAttention, AttnBackend.fused), case)
    return [
        (attention_cases.relative(theirs, truth), attention_cases.relative(mine, truth))
        for theirs, mine, truth in zip(stock, fused, exact, strict=True)
    ]


def test_half_precision_is_as_good_as_stocks(ranks: Ranks) -> None:
    for stock, fused in ranks.run(1, errors_of_half, Core(s=40, d=32, dtype=torch.bfloat16))[0]:
        assert fused <= 2 * stock + torch.finfo(torch.bfloat16).eps, (stock, fused)


def dropped(case: Core) -> dict[str, Any]:
    """With dropout on the CPU the very scores that stock drops, out of the same stream."""
    cpu_backend.enable()
    parallel_state.initialize_model_parallel()
    stock = core(case, DotProductAttention, AttnBackend.unfused)
    fused = core(case, FusedDotProductAttention, AttnBackend.fused)
    before = call(stock, case)
    again, other = call(fused, case), call(fused, case, seed=4)
    fused.eval()
    whole = call(fused, case)
    return {
        "errors": [attention_cases.relative(mine, theirs) for mine, theirs in zip(again, before, strict=True)],
        "another seed": attention_cases.relative(other[0], before[0]),
        "without": attention_cases.relative(whole[0], before[0]),
    }


@pytest.mark.parametrize("config", [{}, {"sequence_parallel": True, "tensor_model_parallel_size": 2}], ids=["", "sp"])
def test_dropout_is_of_megatrons_stream(ranks: Ranks, config: dict[str, Any]) -> None:
    (found,) = ranks.run(1, dropped, Core(s=20, config={"attention_dropout": 0.3, **config}))
    assert max(found["errors"]) < FP32
    assert min(found["another seed"], found["without"]) > 0.05


def kernels() -> tuple[list[str], list[str]]:
    """The names of torch's attention operators that the two cores ran."""
    cpu_backend.enable()
    parallel_state.initialize_model_parallel()
    case = Core(d=512, mask="arbitrary", s=8)
    names = []
    for kind, backend in ((DotProductAttention, AttnBackend.fused), (FusedDotProductAttention, AttnBackend.flash)):
        module = core(case, kind, backend)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call(module, case)
        names.append([event.key for event in profile.key_averages() if "flash" in event.key or "baddbmm" in event.key])
    return names[0], names[1]


def test_the_fused_kernel_is_what_runs(ranks: Ranks) -> None:
    ((stock, fused),) = ranks.run(1, kernels)
    assert any("baddbmm" in name for name in stock) and not any("flash" in name for name in stock)
    assert any("flash" in name and "backward" in name for name in fused) and not any(
        "baddbmm" in name for name in fused
    )


# --- on the grid, and in training ----------------------------------------------------------------------------------


def differences_on_fused(case: Case) -> tuple[dict[str, float], int]:
    """As `differences` against stock's unfused core, and how often the fused one ran."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return fused_attention(*args, **kwargs)

    with mock.patch.object(fused_core, "fused_attention", counted):
        found = attention_cases.differences(case)
    return found, calls


GRID = [
    *(
        Case(2, 2, exchange, h=4, g=2, d=16, s=16, b=2, rope={})
        for exchange in ("batch", "sequence", "scores", "local")
    ),
    Case(2, 2, "batch", h=4, g=2, d=512, s=6, b=2),
    Case(2, 2, "batch", h=4, g=2, s=12, b=4, mask="arbitrary", rope={}),
    Case(2, 2, "batch", h=4, g=2, s=12, b=4, config={"window_size": (4, 0)}),
    Case(2, 2, "batch", h=4, g=2, s=16, b=2, sequence_parallel=True),
    Case(4, 1, "batch", h=8, g=4, s=9, b=3, rope={}),
    Case(2, 3, "local", h=4, g=2, d=24, s=12, b=1, rope={}),
]


@pytest.mark.parametrize("case", GRID, ids=lambda case: case.label)
def test_every_exchange_on_the_fused_core_is_stock(ranks: Ranks, case: Case) -> None:
    case = replace(case, config={**case.config, "attention_backend": AttnBackend.fused})
    for found, calls in ranks.run(case.m * case.n, differences_on_fused, case):
        assert max(found.values()) < FP32, found
        assert calls == RULES[case.exchange].stock_core


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


# With dropout, one layout on both sides: its ranks have streams of their own.
TRAININGS = {
    "2x2": (4, "", "--head-dim-parallel 2,2"),
    "2x2, dropout and recompute": (
        4,
        "--head-dim-parallel 2,2 --attention-dropout 0.2 --recompute-activations",
        "",
    ),
    "stock tp2, dropout, sequence parallel": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --attention-dropout 0.2",
        "",
    ),
    "weights of samples": (4, "", "--head-dim-parallel 2,2 --head-dim-exchange weights"),
    "weights of tokens": (4, "", "--head-dim-parallel 2,2 --head-dim-exchange weights --micro-batch-size 1"),
    "windows, grouped queries, pp2": (
        4,
        "--window-size 9,0 --num-query-groups 2 --swiglu",
        "--head-dim-parallel 1,2 --pipeline-model-parallel-size 2",
    ),
    "documents": (4, "--reset-attention-mask --reset-position-ids --num-query-groups 2", "--head-dim-parallel 2,2"),
}


@pytest.mark.parametrize(("size", "both", "layout"), TRAININGS.values(), ids=TRAININGS)
def test_losses_are_those_of_stocks_core(ranks: Ranks, cache: str, size: int, both: str, layout: str) -> None:
    both = f"{both} --train-iters 8"
    expected, _ = ranks.run(size if not layout else 1, train, cache, both)[-1]
    found, _ = ranks.run(size, train, cache, f"{both} {layout} --attention-backend fused")[-1]
    assert len(found) == 8 and found == pytest.approx(expected, abs=1e-5, rel=0)


def test_auto_says_once_what_the_fused_core_would_not_keep(ranks: Ranks, cache: str) -> None:
    large = "--seq-length 1024 --hidden-size 16 --num-attention-heads 4 --micro-batch-size 4 --global-batch-size 4"
    ((_, said),) = ranks.run(1, train, cache, f"{large} --train-iters 2")
    assert said.count("stock's unfused attention keeps at least 64 MiB of scores per layer") == 1
    assert "(4 × 4 heads × 1024 × 1024); --attention-backend fused keeps none of them" in said
    for quiet in ("--attention-backend fused", "--attention-backend unfused", "--recompute-activations"):
        ((_, said),) = ranks.run(1, train, cache, f"{large} --train-iters 1 {quiet}")
        assert "unfused attention" not in said
