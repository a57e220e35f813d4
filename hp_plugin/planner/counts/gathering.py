"""Where weights move: what a layer gathers and reduces over the dim axis, and what the ends of a block of layers send.

Source: `hp_plugin.exchange.weights`, call by call.
"""

from __future__ import annotations

from dataclasses import dataclass

from hp_plugin.grid.ranks import DIM_INNERMOST
from hp_plugin.planner.counts.program import Block, Collective, Program, Stream
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.machine.collectives import wire_factor

ENOUGH = 4
"""Gradients are sent off once they make this part of a layer (`LayerWeights._arriving`)."""


def with_weights(share: Share, moe: bool, ends: bool, forward: Program, backward: Program) -> tuple[Program, Program]:
    """A layer's programs with its weights gathered before and their gradients reduced behind.

    The gather of the next layer is on its way while one works; that of the first one in each direction, and the last
    gradients, are not beside anything.

    Args:
        share: what stock's ranks hold.
        ends: whether the layer is the one at both ends of its block, for what happens once in a block.
    """
    block = share.block_shape(0 if moe else 1, 1 if moe else 0)
    m, e = share.layout.m, share.e
    biases = block.biases / m * e
    weights = block.weights / m * e
    again = weights + (biases if block.recompute else 0.0)
    ahead = Collective("gather weights", "all_gather", "dim", weights + biases)
    back = Collective("gather weights again", "all_gather", "dim", again)
    reductions = tuple(
        Collective("reduce weight gradients", "reduce_scatter", "dim", size) for size in _reduced(share, moe)
    )
    # Shards of row-parallel weights lie the other way round; gradients are added up in another kernel, and not by the
    # product that makes them.
    turned = Stream("turn row-parallel shards", 2 * _row_bytes(share, moe) / share.layout.n)
    added = Stream(
        "add up weight gradients",
        2 * _row_bytes(share, moe) + (2 * share.workload.grad_itemsize + e) * block.weights / share.layout.tp,
    )
    forward = (Block((turned,)), Block((), (ahead,), behind=not ends), *forward)
    late = () if not ends else reductions[-1:]
    beside = reductions[: len(reductions) - len(late)]
    backward = (Block((turned,)), Block((), (back,), behind=not ends), *backward)
    backward = (*backward, Block((), beside, behind=True), Block((added,), late))
    return forward, backward


def between_ends(
    share: Share, taken: bool, given: bool, forward: Program, backward: Program
) -> tuple[Program, Program]:
    """A block's programs with tokens taken to their ranks before it and given back behind it, where they have to be."""
    nothing = _Way((), ())
    before = to_share(share) if taken else nothing
    behind = to_stock(share) if given else nothing
    repeated = behind.forward if share.layout.recompute == "full" else ()
    forward = (*before.forward, *forward, *behind.forward)
    return forward, (*repeated, *behind.backward, *backward, *before.backward)


def end_weights(share: Share) -> tuple[Collective, Collective]:
    """The gather of embedding's or output layer's weight over the dim axis, and the reduction of its gradient."""
    size = share.model.vocab / share.layout.m * share.model.D * share.e
    return (
        Collective("gather vocabulary", "all_gather", "dim", size),
        Collective("reduce vocabulary gradient", "reduce_scatter", "dim", size),
    )


def with_shared_weights(share: Share, moe: bool, forward: Program, backward: Program) -> tuple[Program, Program]:
    """A layer's programs where data-parallel ranks share its linears' weights: all gathers and reductions beside them.

    Source: Megatron-LM core_v0.19.0, docs/api-guide/core/generalized_tensor_parallel.md, 1.1 and 1.3 (16-bit weights
    and gradients on the wire, one weight ahead, again for recomputation).
    """
    block = share.block_shape(0 if moe else 1, 1 if moe else 0)
    held = block.weights / share.layout.tp
    gather = Block((), (Collective("gather weights", "all_gather", "gtp", held * share.e),), behind=True)
    reduce = Block((), (Collective("reduce weight gradients", "reduce_scatter", "gtp", held * share.e),), behind=True)
    added = Stream(
        "add up weight gradients",
        2 * share.e * held + (2 * share.workload.grad_itemsize + share.e) * held / share.layout.gtp,
    )
    again = (gather, gather) if block.recompute else (gather,)
    return (gather, *forward), (*again, *backward, reduce, Block((added,)))


def on_whole_tokens(share: Share, forward: Program, backward: Program) -> tuple[Program, Program]:
    """Programs of what works on the tokens that stock's ranks hold, between layers that work on a share of them."""
    taken, given = to_share(share), to_stock(share)
    return (*given.forward, *forward, *taken.forward), (*taken.backward, *backward, *given.backward)


def gathered_keys_values(share: Share) -> tuple[Program, Program]:
    """Keys and values of all tokens, where a rank has an n-th of each sample's, or of the token that is decoded and its
    query, too, where a rank has an n-th of a cache; and their gradients."""
    size = float(share.rule.gathered(share.attention_shape) * share.e)
    if not size:
        return (), ()
    what = "qkv" if share.attention_shape.decodes else "keys and values"
    order = Block((Stream(f"order {what}", 2 * size),))
    gather = Collective(f"gather {what}", "all_gather", "dim", size)
    reduce = Collective("reduce key and value gradients", "reduce_scatter", "dim", size)
    return (Block((), (gather,)), order), (order, Block((), (reduce,)))


@dataclass(frozen=True)
class _Way:
    """Programs of one way that tokens go, and of their gradients."""

    forward: Program
    backward: Program


def to_share(share: Share) -> _Way:
    """From what stock's ranks hold to this rank's share: cut where all of them have all tokens, else an all-to-all."""
    cut, spread = _cut_and_spread(share)
    return _Way(cut, spread)


def to_stock(share: Share) -> _Way:
    """The way back."""
    cut, spread = _cut_and_spread(share)
    return _Way(spread, cut)


def _cut_and_spread(share: Share) -> tuple[Program, Program]:
    inside = Stream("cut or join tokens", 2 * share.within.between_bytes)
    if not share.sp:
        gather = Collective("gather tokens of the dim axis", "all_gather", "dim", share.hidden_bytes)
        join = Stream("cut or join tokens", 2 * share.hidden_bytes)
        return (Block((inside,)),), (Block((), (gather,)), Block((join,)))
    shape = share.attention_shape
    head_innermost = share.layout.order != DIM_INNERMOST
    by_samples = shape.b % shape.n == 0
    # Chunks of tokens may come from any rank of the TP group, samples from the dim group alone where its ranks are
    # neighbours, as stock's parts of the sequence then are those of one head group's rank.
    axis, ranks = ("dim", shape.n) if by_samples and not head_innermost else ("tp", share.layout.tp)
    size = share.between_bytes * share.rule.leaving(shape, head_innermost) / wire_factor("all_to_all", ranks)
    trade = Collective("trade tokens", "all_to_all", axis, size)
    both = (Block((inside,), (trade,)), Block((inside,)))
    return both, both


def _row_bytes(share: Share, moe: bool) -> float:
    """Bytes of a head group's row-parallel weights of a layer."""
    model = share.model
    rows = model.h * model.d + (0 if moe else model.ffn)
    return model.D * rows / share.layout.m * share.e


def _reduced(share: Share, moe: bool) -> list[float]:
    """Bytes of the gradients that go together, in backward order."""
    attention, whole = share.block_shape(0, 1), share.block_shape(0 if moe else 1, 1 if moe else 0)
    model = share.model
    first = (2 if model.gated else 1) * model.ffn
    sizes = [] if moe else [model.D * model.ffn, first * model.D + (first if whole.mlp_bias else 0)]
    projection = model.D * model.h * model.d
    sizes += [projection, attention.weights + attention.biases - projection]
    scale = share.e / share.layout.m
    found, waiting = [], 0.0
    for size in sizes:
        waiting += size * scale
        if waiting >= whole.weights * scale / ENOUGH:
            found.append(waiting)
            waiting = 0.0
    return [*found, waiting] if waiting else found


def replicated_parameters(share: Share, layers: int, row_biases: int) -> int:
    """Parameters of a rank's layers that all ranks hold whole, and whose gradients come from a share of the tokens."""
    # Under sequence parallelism stock sums them over all of the TP group.
    return 0 if share.sp else layers * share.model.norms * share.model.norm_parameters + row_biases
