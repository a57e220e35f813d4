"""Shapes of attention layers on grids, for property tests: small, odd and never square."""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st

from hp_plugin.exchange.sizes import AttentionShape

# The same examples in every run and on every machine, and nothing written beside the tests.
EXAMPLES = settings(derandomize=True, database=None, deadline=None, max_examples=100)
NORMS = (None, "L2Norm", "RMSNorm", "LayerNorm")


@st.composite
def grid_shapes(draw: st.DrawFn, max_m: int = 4, max_n: int = 5, grid: tuple[int, int] | None = None) -> AttentionShape:
    """Any shape that a grid divides: m divides the heads and n the head dimension. The exchanges need not fit it."""
    m, n = grid or (draw(st.integers(1, max_m)), draw(st.integers(1, max_n)))
    g = m * draw(st.integers(1, 3))
    d = n * draw(st.integers(1, 6))
    return AttentionShape(
        s=draw(st.integers(1, 40)),
        b=draw(st.integers(1, 12)),
        h=g * draw(st.integers(1, 3)),
        g=g,
        d=d,
        m=m,
        n=n,
        causal=draw(st.booleans()),
        gate=draw(st.booleans()),
        rotary=2 * draw(st.integers(0, d // 2)),
        rotary_interleaved=draw(st.booleans()),
        qk_norm=draw(st.sampled_from(NORMS)),
    )


@st.composite
def divided_shapes(
    draw: st.DrawFn, max_m: int = 4, max_n: int = 5, grid: tuple[int, int] | None = None
) -> AttentionShape:
    """Shapes whose batch divides by n and whose sequence divides by 2n, which `batch` and `sequence` carry."""
    shape = draw(grid_shapes(max_m, max_n, grid))
    return replace(shape, s=2 * shape.n * draw(st.integers(1, 3)), b=shape.n * draw(st.integers(1, 3)))
