"""One transformer layer on one rank: forward, and backward with what recomputation repeats."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hp_plugin.planner.counts.exchange import exchanged
from hp_plugin.planner.counts.gathering import between_ends, on_whole_tokens, with_shared_weights, with_weights
from hp_plugin.planner.counts.linear import column_backward, column_forward, row_backward, row_forward
from hp_plugin.planner.counts.moe import moe_backward, moe_forward
from hp_plugin.planner.counts.program import Block, Collective, FusedAttention, Gemm, Program, Stream
from hp_plugin.planner.counts.share import Share


@dataclass(frozen=True)
class Passes:
    """A forward and a backward program."""

    forward: Program
    backward: Program


def layer_passes(share: Share, moe: bool, ends: bool = False, taken: bool = True, given: bool = True) -> Passes:
    """A layer with attention and a dense MLP, or experts if `moe`.

    Args:
        ends: whether it is the layer of a stage with which is counted what happens once in a stage where weights move.
        taken, given: whether tokens have to be taken to their ranks for the stage, and back behind it.
    """
    within = share.within
    if share.spreads_samples and not moe:
        return Passes(attention_forward(within) + mlp_of_all_samples(share), ())
    ahead, back = _experts(share) if moe else (mlp_forward(within), mlp_backward(within))
    forward, backward = attention_forward(within) + ahead, back + attention_backward(within)
    recompute = share.layout.recompute
    if recompute == "full":
        backward = forward + backward
    elif recompute == "selective":
        backward = _windowed(within, exchanged(within).core) + backward
    if share.rule.moves_weights:
        forward, backward = with_weights(share, moe, ends, forward, backward)
        return Passes(*between_ends(share, taken, given, forward, backward)) if ends else Passes(forward, backward)
    if share.layout.gtp > 1:
        return Passes(*with_shared_weights(share, moe, forward, backward))
    if share.layout.zero == "full":
        return Passes(*_sharded(share, moe, forward, backward))
    return Passes(forward, backward)


def _experts(share: Share) -> tuple[Program, Program]:
    """Mixtures work on the tokens that they find; DeepSpeed's on those that all of stock's ranks have."""
    if share.layout.moe == "megatron" or not share.rule.moves_weights:
        return moe_forward(share.within), moe_backward(share.within)
    return on_whole_tokens(share, moe_forward(share), moe_backward(share))


def attention_forward(share: Share) -> Program:
    """Norm, QKV, exchange, core attention, exchange, projection, residual."""
    model, rows = share.model, share.qkv_rows
    parts = exchanged(share)
    return (
        _norm(share, 2),
        *column_forward(share, "qkv", rows),
        *parts.before,
        *_rotary(share),
        *_windowed(share, parts.core),
        *parts.after,
        *row_forward(share, "proj", model.h * model.d // share.P),
        *_norm_after(share, 2),
        _residual(share),
    )


def attention_backward(share: Share) -> Program:
    """The gradient of `attention_forward`, in backward order."""
    model, rows = share.model, share.qkv_rows
    parts = exchanged(share)
    return (
        _residual(share),
        *_norm_after(share, 3),
        *row_backward(share, "proj", model.h * model.d // share.P),
        *parts.after_gradient,
        *_windowed(share, parts.core_gradient),
        *_rotary(share),
        *parts.before_gradient,
        *column_backward(share, "qkv", rows),
        _norm(share, 3),
    )


def mlp_forward(share: Share) -> Program:
    """Norm, first linear, activation, second linear, residual."""
    inner = share.model.ffn // share.P
    first = inner * (2 if share.model.gated else 1)
    return (
        _norm(share, 2),
        *column_forward(share, "fc1", first),
        Block((Stream("activation", float(first + inner) * share.tokens * share.e),)),
        *row_forward(share, "fc2", inner),
        *_norm_after(share, 2),
        _residual(share),
    )


def mlp_of_all_samples(share: Share) -> Program:
    """The MLP, split over all ranks, of samples that attention has spread over them."""
    within = share.within
    inner = share.model.ffn // share.P
    first = inner * (2 if share.model.gated else 1)
    gather = Collective("gather samples", "all_gather", "dim", share.hidden_bytes)
    # Where heads are split, too, several ranks go on with the same samples.
    kind = "reduce_scatter" if share.layout.m == 1 else "all_reduce"
    scatter = Collective("fc2: sum", kind, "tp", share.hidden_bytes)
    return (
        _norm(within, 2),
        Block((), (gather,)),
        Block((Gemm("fc1", share.tokens, first, share.model.D),)),
        Block((Stream("activation", float(first + inner) * share.tokens * share.e),)),
        Block((Gemm("fc2", share.tokens, share.model.D, inner),), (scatter,)),
        *_norm_after(within, 2),
        _residual(within),
    )


def mlp_backward(share: Share) -> Program:
    """The gradient of `mlp_forward`, in backward order."""
    inner = share.model.ffn // share.P
    first = inner * (2 if share.model.gated else 1)
    return (
        _residual(share),
        *_norm_after(share, 3),
        *row_backward(share, "fc2", inner),
        Block((Stream("activation gradient", float(2 * first + inner) * share.tokens * share.e),)),
        *column_backward(share, "fc1", first),
        _norm(share, 3),
    )


def _norm(share: Share, passes: int) -> Block:
    """Reads and writes of [s, b, D]: two forward, three backward; twice that in separate kernels with casts."""
    factor = 1.0 if share.layout.fused else 2.0
    return Block((Stream("norm", factor * passes * share.between_bytes),))


def _windowed(share: Share, program: Program) -> Program:
    """Fused attention skips what a window hides; layers are priced alike, at the mean of those with and without."""
    if not share.model.window:
        return program
    return tuple(
        replace(
            block,
            kernels=tuple(
                replace(kernel, pairs=kernel.pairs * share.model.attended(kernel.keys))
                if isinstance(kernel, FusedAttention)
                else kernel
                for kernel in block.kernels
            ),
        )
        for block in program
    )


def _norm_after(share: Share, passes: int) -> Program:
    """The norm of what attention or the MLP gives, in layers that have one beside the norm before."""
    return (_norm(share, passes),) if share.model.norms > 2 else ()


def _residual(share: Share) -> Block:
    """Two reads and a write, and the dropout mask's byte per element."""
    masks = share.between_bytes / share.e if share.model.dropout else 0.0
    return Block((Stream("residual", 3 * share.between_bytes + masks),))


def _rotary(share: Share) -> Program:
    model = share.model
    if not model.rotary:
        return ()
    rotated = (model.h + model.g) * model.d * model.rotary_percent / share.P * share.tokens * share.e
    return (Block((Stream("rotary embedding", 2 * rotated),)),)


FSDP_GRADIENT_BYTES = 18.0
"""Memory traffic per parameter of PyTorch FSDP's flat gradients in one backward pass: joined (4), cast to the reduction
dtype (6), divided before the reduction (8) (`torch.distributed.fsdp._runtime_utils._reduce_grad`)."""


def _sharded(share: Share, moe: bool, forward: Program, backward: Program) -> tuple[Program, Program]:
    """Fully sharded data parallelism: weights are gathered beside each pass, gradients scattered beside backward."""
    parameters = share.model.layer_parameters(moe) / share.layout.tp
    backward = (*backward, Block((Stream("flat gradients", FSDP_GRADIENT_BYTES * parameters),)))
    gather = Collective("gather weights", "all_gather", "dp", parameters * share.e)
    scatter = Collective("scatter gradients", "reduce_scatter", "dp", parameters * share.workload.grad_itemsize)
    behind = Block((), (gather,), behind=True)
    return (*forward, behind), (*backward, behind, Block((), (scatter,), behind=True))
