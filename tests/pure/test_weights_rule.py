"""What `weights` needs and refuses, and when the ends of a model move less on a share of the tokens."""

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.rules import RULES
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.exchange.weights.rule import embedding_moves_less, output_moves_less
from hp_plugin.refusal import RefusedError

SHAPE: dict[str, Any] = {"h": 8, "g": 4, "d": 8, "m": 2, "n": 4}


@pytest.mark.parametrize(("s", "b"), [(7, 4), (7, 8), (16, 1), (24, 3)])
def test_samples_or_tokens(s: int, b: int) -> None:
    assert HeadDimConfig(2, 4, "weights").check_shape(AttentionShape(s=s, b=b, **SHAPE)) == "weights"


def test_a_shape_that_fits_neither_is_refused_with_what_would_work() -> None:
    with pytest.raises(RefusedError) as caught:
        HeadDimConfig(2, 4, "weights").check_shape(AttentionShape(s=12, b=6, **SHAPE))
    said = str(caught.value)
    assert "6 % 4 = 2" in said and "12 % 8 = 4" in said
    assert said.endswith("--head-dim-exchange scores can")


def test_tokens_refuse_what_only_stocks_inner_attention_does() -> None:
    asked = ("do a softmax offset",)
    config = HeadDimConfig(2, 4, "weights")
    assert config.check_shape(AttentionShape(s=16, b=4, stock_core_alone=asked, **SHAPE)) == "weights"
    with pytest.raises(RefusedError, match="1 samples over n = 4 ranks and cannot do a softmax offset"):
        config.check_shape(AttentionShape(s=16, b=1, stock_core_alone=asked, **SHAPE))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("context_parallel_size", 2, "context parallelism (2)"),
        ("fp8", "hybrid", "fp8"),
        ("distribute_saved_activations", True, "--distribute-saved-activations"),
        ("cuda_graph_impl", "local", "CUDA graphs"),
        ("overlap_moe_expert_parallel_comm", True, "--overlap-moe-expert-parallel-comm"),
        ("moe_router_load_balancing_type", ["aux_loss", "seq_aux_loss"], "seq_aux_loss"),
    ],
)
def test_features_that_weights_cannot_do(field: str, value: Any, said: str) -> None:
    plain = {"context_parallel_size": 1}
    assert RULES["weights"].cannot(SimpleNamespace(**plain)) == ()
    (found,) = RULES["weights"].cannot(SimpleNamespace(**(plain | {field: value})))
    assert said in found
    assert RULES["batch"].cannot(SimpleNamespace(**(plain | {field: value}))) == ()


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("m", "n"), [(4, 4), (2, 3), (1, 8), (8, 2)])
def test_ends_go_where_less_is_sent(m: int, n: int, sequence_parallel: bool) -> None:
    """Elements sent per D in one step of training, collective by collective, on either side."""
    P = m * n

    def gather(size: int, ranks: int) -> Fraction:  # or reduce-scatter, or an all-to-all
        return Fraction((ranks - 1) * size, ranks)

    def all_reduce(size: Fraction, ranks: int) -> Fraction:
        return 2 * (ranks - 1) * size / ranks

    for vocabulary, t in ((24 * k, 48 * j) for k in range(1, 60) for j in range(1, 12)):
        whole, share = Fraction(vocabulary, m), Fraction(t, n)
        if sequence_parallel:
            # Embedding: scattered over P, then to the shares, and back; output: gathered, again in backward, scattered.
            stock_in = 2 * gather(t, P) + 2 * gather(t, n) / P
            stock_out = 3 * gather(t, P) + 2 * gather(t, n) / P
            own_in = 2 * gather(1, n) * whole + 2 * gather(1, m) * share
            own_out = 3 * gather(1, n) * whole + 3 * gather(1, m) * share
        else:
            # Embedding: all-reduced over P, its gradient gathered; output: hidden states gathered, gradient reduced.
            stock_in = all_reduce(Fraction(t), P) + gather(t, n)
            stock_out = gather(t, n) + all_reduce(Fraction(t), P)
            own_in = 2 * gather(1, n) * whole + all_reduce(share, m)
            own_out = 3 * gather(1, n) * whole + all_reduce(share, m)
        sizes = (vocabulary, t, m, P, sequence_parallel)
        if own_in != stock_in:
            assert embedding_moves_less(*sizes) == (own_in < stock_in), sizes
        if own_out != stock_out:
            assert output_moves_less(*sizes) == (own_out < stock_out), sizes


@pytest.mark.parametrize("head_innermost", [False, True])
@pytest.mark.parametrize(("m", "n", "b"), [(2, 2, 4), (2, 3, 3), (3, 2, 2), (4, 2, 2), (2, 2, 1), (2, 3, 2), (3, 2, 1)])
def test_what_leaves_a_rank_at_an_end_counted_token_by_token(m: int, n: int, b: int, head_innermost: bool) -> None:
    """Under sequence parallelism rank r has positions r · s/P on; inside its samples' or chunks' m-th."""
    s = 2 * m * n * 6
    shape = AttentionShape(s=s, b=b, h=m, g=m, d=n, m=m, n=n)
    left = 0
    for rank in range(m * n):
        i, j = (rank % m, rank // m) if head_innermost else (rank // n, rank % n)
        if b % n == 0:
            inside = {(t, k) for t in range(i * s // m, (i + 1) * s // m) for k in range(j * b // n, (j + 1) * b // n)}
        else:
            size = s // (2 * n)
            chunks = [*range(j * size, (j + 1) * size), *range((2 * n - 1 - j) * size, (2 * n - j) * size)]
            inside = {(t, k) for t in chunks[i * s // (m * n) : (i + 1) * s // (m * n)] for k in range(b)}
        outside = {(t, k) for t in range(rank * s // (m * n), (rank + 1) * s // (m * n)) for k in range(b)}
        left += len(outside - inside)
    assert RULES["weights"].leaving(shape, head_innermost) == pytest.approx(left / (s * b), abs=1e-12)
