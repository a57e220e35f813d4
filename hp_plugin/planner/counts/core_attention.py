"""Core attention as kernels: fused where the machine has a fused kernel, else product by product."""

from __future__ import annotations

from hp_plugin.planner.counts.program import FusedAttention, Gemm, Kernel, Stream


def core_forward(
    *, samples: int, heads: int, groups: int, queries: int, keys: int, width: int, fused: bool, dropout: bool, e: int
) -> tuple[Kernel, ...]:
    """Causal attention of `queries` rows per head against `keys` positions; `e` bytes per element.

    Args:
        heads, groups: query and key/value heads per sample.
        queries: rows; fewer than keys when a rank has a balanced share of them.
    """
    batch = samples * heads
    if fused:
        return (FusedAttention("attention", _pairs(queries, keys), batch, queries, keys, width, True),)
    scores = float(batch) * queries * keys
    expand = (Stream("expand k, v", 4.0 * e * samples * heads * keys * width),) if groups < heads else ()
    masks = (Stream("attention dropout", (2 * e + 1) * scores, slow=True),) if dropout else ()
    return (
        *expand,
        Gemm("scores", queries, keys, width, batch),
        Stream("softmax", 2 * e * scores, slow=True),
        *masks,
        Gemm("context", queries, width, keys, batch),
    )


def core_backward(
    *, samples: int, heads: int, groups: int, queries: int, keys: int, width: int, fused: bool, dropout: bool, e: int
) -> tuple[Kernel, ...]:
    """The gradient of `core_forward`."""
    batch = samples * heads
    if fused:
        return (FusedAttention("attention gradient", _pairs(queries, keys), batch, queries, keys, width, True, True),)
    scores = float(batch) * queries * keys
    masks = (Stream("attention dropout gradient", (2 * e + 1) * scores, slow=True),) if dropout else ()
    fold = (Stream("fold k, v gradients", 4.0 * e * samples * heads * keys * width),) if groups < heads else ()
    return (
        Gemm("value gradient", keys, width, queries, batch),
        Gemm("probability gradient", queries, keys, width, batch),
        *masks,
        Stream("softmax gradient", 3 * e * scores, slow=True),
        Gemm("query gradient", queries, width, keys, batch),
        Gemm("key gradient", keys, width, queries, batch),
        *fold,
    )


def _pairs(queries: int, keys: int) -> float:
    # Causal: a balanced share of the queries sees half of the keys on average.
    return queries * keys / 2.0
