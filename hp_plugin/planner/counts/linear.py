"""Tensor-parallel linear layers as Megatron-Core runs them: the product, its gradients, and the TP collectives.

Source: `megatron.core.tensor_parallel.layers` (`ColumnParallelLinear`, `RowParallelLinear`,
`LinearWithGradAccumulationAndAsyncCommunication`). The grid's layers are these over all P ranks.
"""

from __future__ import annotations

from hp_plugin.planner.counts.program import Block, Collective, Gemm, Program, Stream
from hp_plugin.planner.counts.share import Share


def column_forward(share: Share, name: str, rows: int) -> Program:
    """[s, b, D] to this rank's `rows` outputs; sequence-parallel input is gathered first."""
    product = Gemm(name, share.tokens, rows, share.model.D)
    if not share.sp:
        return (Block((product,)),)
    gather = Collective(f"{name}: gather tokens", "all_gather", share.axis, share.hidden_bytes)
    return _joined(share, product, gather)


def column_backward(share: Share, name: str, rows: int) -> Program:
    """Input gradient, then weight gradient; the input gradient's reduction runs beside the latter."""
    tokens, hidden = share.tokens, share.model.D
    data = Gemm(f"{name} input gradient", tokens, hidden, rows)
    weight = Gemm(f"{name} weight gradient", rows, hidden, tokens, accumulate=True)
    if share.P == 1:
        return (Block((data, weight)),)
    if not share.sp:
        reduce = Collective(f"{name}: sum input gradient", "all_reduce", share.axis, share.hidden_bytes)
        return (Block((data,)), Block((weight,), (reduce,), overlap=True))
    gather = Collective(f"{name}: gather tokens again", "all_gather", share.axis, share.hidden_bytes)
    scatter = Collective(f"{name}: scatter input gradient", "reduce_scatter", share.axis, share.hidden_bytes)
    return (Block((data,), (gather,), overlap=True), Block((weight,), (scatter,), overlap=True))


def row_forward(share: Share, name: str, columns: int) -> Program:
    """This rank's `columns` inputs to partial sums of [s, b, D], summed over the TP group."""
    product = Gemm(name, share.tokens, share.model.D, columns)
    if share.P == 1:
        return (Block((product,)),)
    if share.sp:
        return _joined(
            share, product, Collective(f"{name}: scatter tokens", "reduce_scatter", share.axis, share.hidden_bytes)
        )
    return (Block((product,), (Collective(f"{name}: sum", "all_reduce", share.axis, share.hidden_bytes),)),)


def row_backward(share: Share, name: str, columns: int) -> Program:
    """Gradients of a row-parallel layer; sequence-parallel output gradients are gathered first."""
    data = Gemm(f"{name} input gradient", share.tokens, columns, share.model.D)
    weight = Gemm(f"{name} weight gradient", share.model.D, columns, share.tokens, accumulate=True)
    if not share.sp:
        return (Block((data, weight)),)
    gather = Collective(f"{name}: gather output gradient", "all_gather", share.axis, share.hidden_bytes)
    return (*_joined(share, data, gather), Block((weight,)))


def gathered_columns(what: str, size: float) -> Program:
    """All ranks' columns, `size` bytes together: a gather along the first dimension, then a copy that joins them.

    Source: `megatron.core.tensor_parallel.mappings._gather_along_last_dim`.
    """
    gather = Collective(f"gather {what}", "all_gather", "tp", size)
    return (Block((), (gather,)), Block((Stream(f"join gathered {what}", 2 * size),)))


def _joined(share: Share, product: Gemm, collective: Collective) -> Program:
    """A product and the collective that feeds or drains it: beside it, piece by piece, with `tp_overlap`."""
    if share.layout.tp_overlap:
        return (Block((product,), (collective,), overlap=True, pieces=share.P),)
    if collective.kind == "all_gather":
        return (Block((), (collective,)), Block((product,)))
    return (Block((product,), (collective,)),)
