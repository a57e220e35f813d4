"""What each exchange adds around and inside core attention on one rank."""

from __future__ import annotations

from dataclasses import dataclass

from hp_plugin.exchange.rules import RULES
from hp_plugin.exchange.scores.rule import SCORES_BLOCK, ScoresRule
from hp_plugin.planner.counts.core_attention import core_backward, core_forward, is_fused
from hp_plugin.planner.counts.linear import gathered_columns
from hp_plugin.planner.counts.program import Block, Collective, Gemm, Kernel, Program, Stream
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
    """Core attention of one rank under its layout's exchange; stock and n = 1 add nothing."""
    name = share.exchange
    if name == "scores":
        return _scores(share)
    n = share.layout.n
    heads, groups, width = share.heads, share.groups, share.model.d
    samples, queries, keys = share.b, share.s, share.workload.seq
    before: Program = ()
    after: Program = ()
    before_gradient: Program = ()
    if name == "local":
        width //= n
    elif name == "batch":
        samples //= n
        before = before_gradient = _trade("qkv", share.qkv_bytes)
        after = _trade("context", share.context_bytes)
    elif name == "sequence":
        queries //= n
        grouped = 2 * share.model.g * share.model.d / share.P * share.tokens * share.e
        # Every rank of the dim group gets this rank's slice of all keys and values beside its own queries.
        sent = share.qkv_bytes - grouped + n * grouped
        before = before_gradient = _trade("qkv", sent)
        after = _trade("context", share.context_bytes)
    if share.gathers_qkv:
        gathered = share.qkv_bytes * share.P
        before = gathered_columns("qkv", gathered)
        # The gradient of a rank's own heads is laid into zeros of the gathered size, which then are copied apart.
        split = Stream("split qkv gradient", 3 * gathered)
        before_gradient = (Block((split,), (Collective("scatter qkv gradient", "reduce_scatter", "tp", gathered),)),)
    shape = {
        "samples": samples, "heads": heads, "groups": groups, "queries": queries, "keys": keys, "width": width,
        "e": share.e,
    }  # fmt: skip
    if share.workload.mode == "decode":
        cache = 2.0 * samples * groups * width * keys * share.e
        return Exchanged(before, (Block((Stream("kv cache", cache),)),), after, (), before_gradient)
    fused = is_fused(width, share.workload.training)
    dropout = share.model.dropout and share.workload.training
    core = core_forward(**shape, fused=fused, dropout=dropout)
    gradient = core_backward(**shape, fused=fused, dropout=dropout)
    if share.layout.cp > 1:
        held = 2.0 * samples * groups * queries * width * share.e
        ring, ring_gradient = _ring(share, core, held), _ring(share, gradient, 2 * held)
        return Exchanged(before, ring, after, ring_gradient, before_gradient)
    return Exchanged(before, (Block(core),), after, (Block(gradient),), before_gradient)


def _trade(what: str, size: float) -> Program:
    """Copy into send order, all-to-all in the dim group, copy out."""
    copy = Stream(f"reorder {what}", 2 * size)
    return (Block((copy,), (Collective(f"trade {what}", "all_to_all", "dim", size),)), Block((copy,)))


def _ring(share: Share, core: tuple[Kernel, ...], size: float) -> Program:
    """Context parallelism: keys and values (and their gradients), `size` bytes, travel a ring beside the attention."""
    steps = share.layout.cp - 1
    sends = tuple(Collective("pass k, v on", "send_recv", "cp", size) for _ in range(steps))
    return (Block(core, sends, overlap=True, pieces=share.layout.cp),)


def _scores(share: Share) -> Exchanged:
    """Partial scores, a block of queries at a time, each block's all-reduce beside the next block's products."""
    rule = RULES["scores"]
    assert isinstance(rule, ScoresRule), "the scores exchange has its own rule"
    shape, n = share.attention_shape, share.layout.n
    area = rule.score_elements(shape)
    blocks = -(-share.s // SCORES_BLOCK)
    slices = share.model.d // n
    halves = rule.elements(shape) - 2 * (n - 1) * area // n
    rotate: Program = ()
    if halves:
        size = halves * n / (n - 1) * share.e
        rotate = (
            Block((Stream("pick rotary halves", 2 * size),), (Collective("trade halves", "all_to_all", "dim", size),)),
        )
    ends = [min(start + SCORES_BLOCK, share.s) for start in range(0, share.s, SCORES_BLOCK)]
    heads = share.b * share.heads
    rows = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    e = share.e

    def products(*names: str) -> tuple[Gemm, ...]:
        return tuple(
            Gemm(name, row, slices, end, heads) if name.startswith("to ") else Gemm(name, row, end, slices, heads)
            for row, end in zip(rows, ends, strict=True)
            for name in names
        )

    def reductions(copies: int) -> tuple[Collective, ...]:
        return tuple(
            Collective("sum scores", "all_reduce", "dim", float(copies * heads * row * end * e))
            for row, end in zip(rows, ends, strict=True)
        )

    # As the plugin computes them, in fp32: cast, mask, softmax, cast back; and the softmax gradient's products.
    softmax = Stream("softmax of blocks", (2 * e + 20.0) * area, slow=True)
    softmax_gradient = Stream("softmax gradient of blocks", (2 * e + 36.0) * area, slow=True)
    core = (Block((*products("partial scores", "to context"), softmax), reductions(1), overlap=True, pieces=blocks),)
    gradient = (
        Block(
            (
                *products("partial scores", "partial probability gradient", "to value gradient"),
                *products("to query gradient", "to key gradient"),
                softmax,
                softmax_gradient,
            ),
            reductions(2),
            overlap=True,
            pieces=blocks,
        ),
    )
    norms = _slice_norms(share)
    return Exchanged((*norms, *rotate), core, (), gradient, (*rotate, *norms))


def _slice_norms(share: Share) -> Program:
    """QK-norm of slices: an fp32 sum of squares (after one for the mean) per head and token, forward and backward."""
    model = share.model
    if not model.qk_norm:
        return ()
    steps = 2 if model.norm_biases else 1
    sums = tuple(
        Collective(f"norms of {what}", "all_reduce", "dim", 4.0 * share.tokens * heads)
        for what, heads in (("queries", share.heads), ("keys", share.groups))
    )
    return (Block((), sums * steps),)
