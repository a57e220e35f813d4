"""DeepSpeed-MoE on the grid equals DeepSpeed-MoE on one rank, and sends every token where its gate says, once."""

from collections import Counter
from typing import Any

import pytest

from tests.adapters.moe_cases import Case, differences, journeys
from tests.ranks import Ranks

pytestmark = [
    # Stock MoE needs it; DeepSpeed-MoE takes replicated tokens.
    pytest.mark.filterwarnings("ignore:When using expert parallelism and tensor parallelism:UserWarning:megatron"),
]

# fp32: sums over tokens in another order leave a few ulp. What one rank draws at random, all ranks draw.
TOLERANCE = 2e-6

REPLICATED = [
    Case(),
    Case(k=2),
    Case(k=3, experts=8),
    Case(ep=2),
    Case(ep=2, k=2, experts=8),
    Case(m=4, n=1, ep=1),
    Case(m=1, n=4, bias=False, gated=True),
    Case(s=5, b=1),
]
CAPACITY = [
    Case(capacity=0.6),
    Case(capacity=0.6, options=(("use_rts", False),)),
    Case(m=4, n=1, capacity=0.3, options=(("min_capacity", 3),)),
    Case(k=2, capacity=1.0, gated=True),
    Case(k=2, experts=8, ep=2, capacity=0.7),
    Case(k=3, experts=8, capacity=0.7),
    Case(k=1, options=(("noisy_gate_policy", "Jitter"),)),
    Case(k=2, capacity=0.8, options=(("top2_2nd_expert_sampling", True),)),
]
SEQUENCE_PARALLEL = [
    Case(sequence_parallel=True),
    Case(sequence_parallel=True, k=2, experts=8, ep=2, capacity=0.7),
    Case(sequence_parallel=True, capacity=0.7, options=(("noisy_gate_policy", "Jitter"),)),
]
EXPERT_TENSOR_PARALLEL = [
    Case(ep=1, etp=4, bias=False),
    Case(ep=1, etp=4, bias=False, gated=True, k=2, sequence_parallel=True),
    Case(ep=1, etp=4, bias=False, capacity=0.6),
]
EIGHT_RANKS = [
    Case(),
    Case(experts=8, ep=8),
    Case(ep=2, k=2, sequence_parallel=True),
    Case(ep=8, experts=8, k=2, capacity=0.7),
    Case(ep=2, etp=4, bias=False, gated=True),
    Case(ep=2, etp=4, bias=False, k=2, capacity=0.7),
    Case(m=2, n=1, ep=4, k=2),
    Case(m=4, n=2, ep=4, k=1, capacity=0.6),
]


def label(case: Case) -> str:
    return case.label


@pytest.mark.parametrize("case", REPLICATED + CAPACITY + SEQUENCE_PARALLEL + EXPERT_TENSOR_PARALLEL, ids=label)
def test_the_layer_equals_one_rank(ranks: Ranks, case: Case) -> None:
    compare(ranks.run(4, differences, case), case)


@pytest.mark.parametrize("case", EIGHT_RANKS, ids=label)
def test_the_layer_equals_one_rank_per_copy_of_the_model(ranks: Ranks, case: Case) -> None:
    compare(ranks.run(8, differences, case), case)


def compare(found: list[dict[str, float]], case: Case) -> None:
    for rank, differing in enumerate(found):
        share = differing.pop("share")
        assert (share > 0) == (case.capacity is not None), "a capacity that drops nobody tests nothing"
        wrong = {name: value for name, value in differing.items() if value > TOLERANCE}
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.mark.parametrize(
    ("world", "case"),
    [
        (4, Case()),
        (4, Case(m=1, n=4, k=2)),
        (4, Case(m=4, n=1, ep=2, experts=8, k=3)),
        (4, Case(sequence_parallel=True, k=2)),
        (4, Case(ep=1, etp=4, bias=False)),
        (8, Case(ep=8, experts=8, k=2)),
        (8, Case(ep=2, etp=4, bias=False, k=2)),
        (8, Case(m=2, n=1, ep=4, sequence_parallel=True)),
        (8, Case(m=2, n=4, ep=2)),
    ],
    ids=lambda value: value.label if isinstance(value, Case) else str(value),
)
def test_every_token_meets_the_experts_its_gate_chose_exactly_once(ranks: Ranks, world: int, case: Case) -> None:
    found: list[Any] = ranks.run(world, journeys, case)
    met = Counter(pair for pairs, _, _ in found for pair in pairs)
    wanted = Counter(pair for _, pairs, _ in found for pair in pairs)
    replicas = world // (case.m * case.n)
    assert wanted.total() == case.s * case.b * case.k * replicas
    assert met == wanted
    # Token numbers reach 24 · replicas, so the products with them are rounded at about 1e-5.
    assert max(error for _, _, error in found) < 1e-4
