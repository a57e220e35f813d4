"""Before the first and after the last layer: embedding, final norm, logits and loss."""

from __future__ import annotations

from hp_plugin.planner.counts.gathering import end_weights
from hp_plugin.planner.counts.layer import Passes
from hp_plugin.planner.counts.linear import column_backward, column_forward, gathered_columns
from hp_plugin.planner.counts.program import Block, Collective, Program, Stream
from hp_plugin.planner.counts.share import Share

UNFUSED_LOSS_BYTES = 30.0
"""Memory traffic of PyTorch's cross entropy per 16-bit logit: cast up (6), log-softmax (8), its gradient (8), cast
down (6), and the logits' own write (2)."""

PARALLEL_LOSS_BYTES = 54.0
"""The same for Megatron-Core's vocabulary-parallel cross entropy (`tensor_parallel/cross_entropy.py`), counted kernel
by kernel: cast, maximum, subtraction, exponential, sum, division, and the scaled gradient, in fp32."""


def embedding(share: Share) -> Passes:
    """Token (and position) embedding: vocabulary-parallel, summed over the TP group.

    Or over the head group, on this rank's share of the tokens (`hp_plugin.exchange.weights.ends`).
    """
    if not share.model.vocab:
        return Passes((), ())
    fetched: Program = ()
    reduced: tuple[Collective, ...] = ()
    on = share
    if share.moved_ends[0]:
        gather, reduce = end_weights(share)
        fetched, reduced, on = (Block((), (gather,)),), (reduce,), share.within
    reads = (3 if share.model.learned_positions else 2) * on.hidden_bytes
    spread: tuple[Collective, ...] = ()
    again: tuple[Collective, ...] = ()
    if on.P > 1:
        # Megatron-Core scatters the sum in one collective only where nothing is added to it in between.
        kind = "reduce_scatter" if on.sp and not share.model.learned_positions else "all_reduce"
        spread = (Collective("embedding: sum", kind, on.axis, on.hidden_bytes),)
        if on.sp:
            again = (Collective("embedding: gather gradient", "all_gather", on.axis, on.hidden_bytes),)
    return Passes(
        (*fetched, Block((Stream("embedding", reads),), spread)),
        (Block((), again), Block((Stream("embedding gradient", reads),), reduced)),
    )


def head(share: Share) -> Passes:
    """Final norm, logits and cross entropy (in decode, sampling); without a vocabulary the norm alone."""
    if share.moved_ends[1]:
        return _head_on_share(share)
    norm = Block((Stream("final norm", 2 * share.between_bytes),))
    norm_gradient = Block((Stream("final norm gradient", 3 * share.between_bytes),))
    model = share.model
    if not model.vocab:
        return Passes((norm,), (norm_gradient,))
    rows = -(-model.vocab // share.P)
    logits = float(rows * share.tokens)
    if share.workload.mode == "decode":
        gather = Collective("gather samples", "all_gather", "dim", share.hidden_bytes)
        joined = (Block((), (gather,)),) if share.spreads_samples else ()
        return Passes((norm, *joined, *column_forward(share, "logits", rows), *_sampling(share, logits)), ())
    per_logit = PARALLEL_LOSS_BYTES if share.layout.fused else UNFUSED_LOSS_BYTES
    # Forward carries two thirds of the loss kernels' traffic.
    loss = Block((Stream("loss", per_logit * logits * 2 / 3),), _loss_sums(share))
    loss_gradient = Block((Stream("loss gradient", per_logit * logits / 3),))
    return Passes(
        (norm, *column_forward(share, "logits", rows), loss),
        (loss_gradient, *column_backward(share, "logits", rows), norm_gradient),
    )


def _loss_sums(share: Share) -> tuple[Collective, ...]:
    """What the ranks that split the vocabulary sum for each token."""
    return tuple(
        Collective(f"loss: {what}", "all_reduce", share.axis, 4.0 * share.tokens)
        for what in ("largest logit", "target logit", "sum of exponentials")
        if share.P > 1
    )


def _head_on_share(share: Share) -> Passes:
    """The same of a head group on this rank's share of the tokens, whose losses then go to all ranks."""
    within = share.within
    gather, reduce = end_weights(share)
    rows = -(-share.model.vocab // within.P)
    logits = float(rows * within.tokens)
    per_logit = PARALLEL_LOSS_BYTES if share.layout.fused else UNFUSED_LOSS_BYTES
    losses = Collective("gather losses", "all_gather", "dim", 4.0 * share.tokens)
    return Passes(
        (
            Block((Stream("final norm", 2 * within.between_bytes),)),
            Block((), (gather,), behind=True),
            *column_forward(within, "logits", rows),
            Block((Stream("loss", per_logit * logits * 2 / 3),), (*_loss_sums(within), losses)),
        ),
        (
            Block((Stream("loss gradient", per_logit * logits / 3),)),
            Block((), (gather,)),
            *column_backward(within, "logits", rows),
            Block((), (reduce,), behind=True),
            Block((Stream("final norm gradient", 3 * within.between_bytes),)),
        ),
    )


def _sampling(share: Share, logits: float) -> Program:
    """Megatron-Core gathers the logits over the TP group, and every rank picks the same tokens."""
    whole = logits * share.P * share.e
    pick = Block((Stream("pick tokens", whole),))
    return (*gathered_columns("logits", whole), pick) if share.P > 1 else (pick,)
