"""A MoE layer's MLP on one rank, as Megatron-Core's or DeepSpeed's layer runs it; tokens spread evenly over experts.

Sources: `megatron.core.transformer.moe` (all-to-all dispatcher, expert tensor parallelism 1);
`deepspeed.moe.sharded_moe.MOELayer` 0.19.8 fed with the TP group's replicated tokens, capacity factor 1.
"""

from __future__ import annotations

from hp_plugin.planner.counts.program import Block, Collective, Gemm, Program, Stream
from hp_plugin.planner.counts.share import Share


def routed_tokens(share: Share) -> int:
    """Token copies that one rank sends into its expert group (and receives, when experts are evenly loaded).

    Megatron-Core's ranks route the tokens they hold: all of a TP group's without sequence parallelism, as in decode.
    """
    if share.layout.moe == "megatron":
        return _own_tokens(share) * share.model.top_k
    return max(1, share.tokens * share.model.top_k // share.P)


def _own_tokens(share: Share) -> int:
    """Tokens that a rank of Megatron-Core's layer holds."""
    return max(1, share.tokens // share.P) if share.sp else share.tokens


def moe_forward(share: Share) -> Program:
    """Norm, router, dispatch, experts, combine, residual."""
    model, between = share.model, share.between_bytes
    routed = float(routed_tokens(share) * model.D * share.e)
    experts = Block(tuple(_experts_forward(share)))
    norm = Block((Stream("norm", 2 * between),))
    residual = Block((Stream("residual", 3 * between),))
    trade = _trade("tokens to experts", routed)
    back = _trade("tokens from experts", routed)
    if share.layout.moe == "megatron":
        router = Gemm("router", _own_tokens(share), model.experts, model.D)
        permute = Stream("permute tokens", 2 * routed)
        ranks = share.layout.ep
        counts = Collective("token counts", "all_gather", "ep", 8.0 * model.experts * ranks)
        return (
            norm,
            Block((router, permute), (counts,)),
            *trade,
            *_trade("gates to experts", 4.0 * routed_tokens(share)),
            experts,
            *back,
            Block((permute,)),
            residual,
        )
    # DeepSpeed routes all tokens on every rank of the TP group, keeps a P-th of every expert's slots, and gathers
    # the results again. Around that its own operators, counted one by one in 16 bit: the gate's fp32 copy and product,
    # a padded copy, the slots picked from it; then the same back, weighted and summed over the choices in fp32.
    gather = share.sp
    full = share.hidden_bytes * model.top_k
    router = Gemm("router", share.tokens, model.experts, model.D)
    encode = Stream("encode tokens", (6 + 2 * model.top_k) * share.hidden_bytes)
    return (
        norm,
        *_if(gather, Block((), (Collective("gather tokens", "all_gather", "tp", share.hidden_bytes),))),
        Block((router, encode)),
        *trade,
        experts,
        *back,
        *_if(share.P > 1, Block((), (Collective("gather expert outputs", "all_gather", "tp", full),))),
        Block((Stream("decode tokens", (5 + 9 * model.top_k) * share.hidden_bytes),)),
        residual,
    )


def moe_backward(share: Share) -> Program:
    """The gradient of `moe_forward`, in backward order."""
    model, between = share.model, share.between_bytes
    routed = float(routed_tokens(share) * model.D * share.e)
    norm = Block((Stream("norm", 3 * between),))
    residual = Block((Stream("residual", 3 * between),))
    experts = Block(tuple(_experts_backward(share)))
    trade = _trade("gradients to experts", routed)
    back = _trade("gradients from experts", routed)
    if share.layout.moe == "megatron":
        permute = Stream("permute gradients", 2 * routed)
        return (
            residual,
            Block((permute,)),
            *trade,
            experts,
            *back,
            *_trade("gate gradients from experts", 4.0 * routed_tokens(share)),
            Block((permute, *_router(share, _own_tokens(share)))),
            norm,
        )
    full = share.hidden_bytes * model.top_k
    return (
        residual,
        *_if(share.sp, Block((), (Collective("gather output gradient", "all_gather", "tp", share.hidden_bytes),))),
        Block((Stream("decode gradients", (12 + 14 * model.top_k) * share.hidden_bytes),)),
        *trade,
        experts,
        *back,
        *_if(share.P > 1, Block((), (Collective("gather slot gradients", "all_gather", "tp", full),))),
        Block((Stream("encode gradients", (1 + 3 * model.top_k) * share.hidden_bytes), *_router(share, share.tokens))),
        norm,
    )


def _experts_forward(share: Share) -> list[Gemm | Stream]:
    local, rows, first = _expert_sizes(share)
    model = share.model
    return [
        Gemm("expert fc1", rows, first, model.D, local),
        Stream("expert activation", float(local * rows * (first + model.ffn) * share.e)),
        Gemm("expert fc2", rows, model.D, model.ffn, local),
    ]


def _experts_backward(share: Share) -> list[Gemm | Stream]:
    local, rows, first = _expert_sizes(share)
    model = share.model
    return [
        Gemm("expert fc2 input gradient", rows, model.ffn, model.D, local),
        Gemm("expert fc2 weight gradient", model.D, model.ffn, rows, local, accumulate=True),
        Stream("expert activation gradient", float(local * rows * (2 * first + model.ffn) * share.e)),
        Gemm("expert fc1 input gradient", rows, model.D, first, local),
        Gemm("expert fc1 weight gradient", first, model.D, rows, local, accumulate=True),
    ]


def _expert_sizes(share: Share) -> tuple[int, int, int]:
    """(experts of this rank that get tokens, rows each of them gets, outputs of the first linear)."""
    routed = routed_tokens(share)
    active = min(share.model.experts // share.layout.ep, routed)
    return active, -(-routed // active), share.model.ffn * (2 if share.model.gated else 1)


def _router(share: Share, tokens: int) -> tuple[Gemm, Gemm]:
    model = share.model
    return (
        Gemm("router input gradient", tokens, model.D, model.experts),
        Gemm("router weight gradient", model.experts, model.D, tokens, accumulate=True),
    )


def _trade(what: str, size: float) -> Program:
    return (Block((), (Collective(what, "all_to_all", "ep", size),)),)


def _if(wanted: bool, block: Block) -> Program:
    return (block,) if wanted else ()
