"""What each exchange adds around and inside core attention on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hp_plugin.planner.counts.core_attention import core_backward, core_forward
from hp_plugin.planner.counts.gathering import gathered_keys_values
from hp_plugin.planner.counts.linear import gathered_columns
from hp_plugin.planner.counts.program import (
    Block,
    Collective,
    Gemm,
    Kernel,
    Program,
    Stream,
    collectives,
    kernels,
)
from hp_plugin.planner.counts.share import Share


@dataclass(frozen=True)
class Exchanged:
    """Programs around core attention: forward `before`, `core`, `after`, and their gradients in backward order."""

    before: Program
    core: Program
    after: Program
    core_gradient: Program
    before_gradient: Program

    @property
    def after_gradient(self) -> Program:
        """The gradient of `after`: the same trade back."""
        return self.after


def exchanged(share: Share) -> Exchanged:
    """Core attention of one rank and what its layout's exchange adds; stock and n = 1 add nothing."""
    rule, shape = share.rule, share.attention_shape
    norms, halves = _slice_norms(share), _rotary_halves(share)
    trade = _trade("qkv", float(rule.traded_in(shape) * share.e))
    before, before_gradient = (*norms, *halves, *trade), (*trade, *halves, *norms)
    trade_parts, join_parts = _joined(share)
    core, core_gradient = _core(share)
    if share.layout.kv_pieces > 1:
        core, trade_parts = _in_pieces(share.layout.kv_pieces, (*core, *trade_parts)), ()
    after = (*trade_parts, *join_parts, *_trade("context", float(rule.traded_out(shape) * share.e)))
    if share.gathers_qkv:
        gathered = share.qkv_bytes * share.P
        before = gathered_columns("qkv", gathered)
        # The gradient of a rank's own heads is laid into zeros of the gathered size, which then are copied apart.
        split = Stream("split qkv gradient", 3 * gathered)
        before_gradient = (Block((split,), (Collective("scatter qkv gradient", "reduce_scatter", "tp", gathered),)),)
    if share.layout.cp_heads > 1:
        # Of the parts of a sequence that context ranks have, whole ones of fewer heads, and the output back.
        q_k_v = _trade("qkv of parts", share.qkv_bytes, "cp_heads")
        before, before_gradient = (*before, *q_k_v), (*q_k_v, *before_gradient)
        after = (*_trade("context of parts", share.context_bytes, "cp_heads"), *after)
    keys_values, their_gradient = gathered_keys_values(share)
    before, before_gradient = (*before, *keys_values), (*their_gradient, *before_gradient)
    return Exchanged(before, core, after, core_gradient, before_gradient)


def _core(share: Share) -> tuple[Program, Program]:
    """Inner attention and its gradient."""
    blocks = share.rule.score_blocks(share.attention_shape)
    if blocks:
        return _summed_blocks(share, blocks)
    inner, groups, keys = share.inner, share.groups, share.workload.seq
    if share.workload.mode == "decode":
        assert share.cached is not None, "exchanges without a cache are refused before"
        cache = share.cached.elements(groups) * share.e * share.model.remembered(keys)
        return (Block((Stream("kv cache", cache),)),), ()
    trading = share.layout.cp_heads
    shape = {
        "samples": inner.samples, "heads": share.heads // trading, "groups": groups // trading,
        "queries": inner.queries * trading, "keys": keys,
        "width": inner.channels, "e": share.e,
    }  # fmt: skip
    fused = share.fused_attention
    dropout = share.model.dropout and share.workload.training
    core = core_forward(**shape, fused=fused, dropout=dropout)
    gradient = core_backward(**shape, fused=fused, dropout=dropout)
    if share.layout.cp > 1:
        # Of fewer heads more tokens: as much travels, fewer times.
        held = 2.0 * inner.samples * groups * inner.queries * inner.channels * share.e
        return _ring(share, core, held), _ring(share, gradient, 2 * held)
    return (Block(core),), (Block(gradient),)


def _joined(share: Share) -> tuple[Program, Program]:
    """Outputs of every rank's part of the cache, traded for all ranks' parts of a slice; and joined by log-sum-exp."""
    shape, rule = share.attention_shape, share.rule
    size = float(rule.joined(shape) * share.e)
    if not size:
        return (), ()
    # An all-to-all's input, of which (n-1)/n are received.
    sums = 4.0 * rule.join_sums(shape) * shape.n / (shape.n - 1)
    traded = Collective("trade partial outputs", "all_to_all", "dim", size + sums)
    copies = Stream("order partial outputs", 2 * (size + sums))
    join = Stream("join outputs", size + sums + size / shape.n)
    return (Block((copies,), (traded,)),), (Block((join,)),)


def _in_pieces(pieces: int, program: Program) -> Program:
    """The same reads, copies and traffic in equal pieces, each piece's collectives beside the next one's kernels."""
    streams = tuple(replace(one, bytes=one.bytes / pieces) for one in kernels(program) if isinstance(one, Stream))
    trades = tuple(replace(one, bytes=one.bytes / pieces) for one in collectives(program))
    return (Block(streams * pieces, trades * pieces, overlap=True, pieces=pieces),)


def _trade(what: str, size: float, axis: str = "dim") -> Program:
    """Copy into send order, all-to-all, copy out."""
    if not size:
        return ()
    copy = Stream(f"reorder {what}", 2 * size)
    return (Block((copy,), (Collective(f"trade {what}", "all_to_all", axis, size),)), Block((copy,)))


def _rotary_halves(share: Share) -> Program:
    """Rotary pairs that the slices cut apart: each rank's halves, picked and sent to where their partners are."""
    halves, n = share.rule.rotary_halves(share.attention_shape), share.layout.n
    if not halves:
        return ()
    # An all-to-all's input, of which (n-1)/n are received.
    size = halves * n / (n - 1) * share.e
    pick = Stream("pick rotary halves", 2 * size)
    return (Block((pick,), (Collective("trade halves", "all_to_all", "dim", size),)),)


def _slice_norms(share: Share) -> Program:
    """QK-norm of slices: an fp32 sum of squares (after one for the mean) per head and token, forward and backward."""
    steps = share.rule.norm_sums(share.attention_shape)
    if not steps:
        return ()
    sums = tuple(
        Collective(f"norms of {what}", "all_reduce", "dim", 4.0 * share.tokens * heads)
        for what, heads in (("queries", share.heads), ("keys", share.groups))
    )
    return (Block((), sums * steps),)


def _ring(share: Share, core: tuple[Kernel, ...], size: float) -> Program:
    """Context parallelism: keys and values (and their gradients), `size` bytes, travel a ring beside the attention."""
    layout = share.layout
    around = layout.cp // layout.cp_heads
    if around == 1:
        return (Block(core),)
    axis = "cp" if layout.cp_heads == 1 else "cp_ring"
    sends = tuple(Collective("pass k, v on", "send_recv", axis, size) for _ in range(around - 1))
    return (Block(core, sends, overlap=True, pieces=around),)


def _summed_blocks(share: Share, blocks: Sequence[tuple[int, int]]) -> tuple[Program, Program]:
    """Partial scores, a block of (queries, keys) at a time, each block's all-reduce beside the next one's products."""
    heads = share.b * share.heads
    width, e = share.inner.channels, share.e
    area = heads * sum(rows * keys for rows, keys in blocks)

    def products(*names: str) -> tuple[Gemm, ...]:
        return tuple(
            Gemm(name, rows, width, keys, heads) if name.startswith("to ") else Gemm(name, rows, keys, width, heads)
            for rows, keys in blocks
            for name in names
        )

    def reductions(copies: int) -> tuple[Collective, ...]:
        return tuple(
            Collective("sum scores", "all_reduce", "dim", float(copies * heads * rows * keys * e))
            for rows, keys in blocks
        )

    # As the plugin computes them, in fp32: cast, mask, softmax, cast back; and the softmax gradient's products.
    softmax = Stream("softmax of blocks", (2 * e + 20.0) * area, slow=True)
    softmax_gradient = Stream("softmax gradient of blocks", (2 * e + 36.0) * area, slow=True)
    forward: tuple[Kernel, ...] = (*products("partial scores", "to context"), softmax)
    backward: tuple[Kernel, ...] = (
        *products("partial scores", "partial probability gradient", "to value gradient"),
        *products("to query gradient", "to key gradient"),
        softmax,
        softmax_gradient,
    )
    return (
        (Block(forward, reductions(1), overlap=True, pieces=len(blocks)),),
        (Block(backward, reductions(2), overlap=True, pieces=len(blocks)),),
    )
