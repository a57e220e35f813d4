"""The plugin's flags in Megatron-LM's parser, and everything about them that can be refused before training starts."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hp_plugin.attention.latent_limits import LATENT_LINEARS
from hp_plugin.attention.transformer_config import unsupported
from hp_plugin.checkpoint.rules import OVERRIDE_FLAG, TRUST_FLAG, record_head_dim
from hp_plugin.config import WIDEST, HeadDimConfig
from hp_plugin.exchange.rules import AUTO, EXCHANGES
from hp_plugin.exchange.shapes import attention_shape
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.grid.ranks import DIM_INNERMOST, ORDERS
from hp_plugin.megatron_lm.unfit_flags import unfit
from hp_plugin.refusal import Refusal, RefusedError, shown

GRID_FLAG, EXCHANGE_FLAG, ORDER_FLAG = "--head-dim-parallel", "--head-dim-exchange", "--head-dim-order"
_SIZES = ("num_attention_heads", "kv_channels", "hidden_size", "micro_batch_size", "seq_length", "world_size")
_SIZES += ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
TP_FLAG = "--tensor-model-parallel-size"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the flags to a parser; where they are not given, the namespace stays without them."""
    group = parser.add_argument_group(title="head × dimension parallelism")
    group.add_argument(
        GRID_FLAG,
        metavar="M,N",
        default=argparse.SUPPRESS,
        help="Run attention on M groups of heads times N slices of the head dimension; sets "
        f"{TP_FLAG} to M·N. '{WIDEST}' picks the widest head axis, M = gcd(TP, query groups), for a given {TP_FLAG}.",
    )
    group.add_argument(
        EXCHANGE_FLAG,
        choices=EXCHANGES,
        default=argparse.SUPPRESS,
        help="How the N slices of a head meet: 'batch' trades slices for full heads of a share of the samples, "
        "'sequence' of the queries, 'scores' sums partial scores; 'weights' gathers weights instead, and whole layers "
        "work on a share of the tokens. 'auto' (default) takes, for every pass, what sends fewest bytes of these. "
        "'local' exchanges nothing and is another function: attention with N times as many, narrower heads.",
    )
    group.add_argument(
        ORDER_FLAG,
        choices=ORDERS,
        default=argparse.SUPPRESS,
        help="Which ranks are neighbours, and so share a node: the N slices of a head (default), or the M groups of "
        "heads. Weights and checkpoints are the same either way.",
    )
    group.add_argument(
        OVERRIDE_FLAG,
        action="store_true",
        default=argparse.SUPPRESS,
        help="Load a checkpoint that was trained with the exchange 'local' on other slices, or with an exact exchange, "
        "although its weights then compute another function.",
    )
    group.add_argument(
        TRUST_FLAG,
        action="store_true",
        default=argparse.SUPPRESS,
        help="On a grid: load a checkpoint although reading its files runs what they name, from a folder whose writer "
        "you trust.",
    )
    return parser


def settle(args: argparse.Namespace, argv: Sequence[str]) -> HeadDimConfig | None:
    """Reads the grid from parsed arguments, checks it against all others and sets the TP size; None without a grid.

    On a grid `args.head_dim_parallel` becomes "m,n", and `args.head_dim_exchange` and `args.head_dim_order` are
    set, which is how Megatron-LM prints them and records them in its checkpoints.

    Args:
        args: what Megatron-LM's parser returned, before its own validation.
        argv: the words it was parsed from, which tell a given TP size from the default one.

    Raises:
        ValueError: flags contradict each other, or ask for what the grid cannot do.
    """
    text, exchange, order = (getattr(args, f"head_dim_{name}", None) for name in ("parallel", "exchange", "order"))
    if text is None:
        if exchange is not None:
            raise ValueError(f"{EXCHANGE_FLAG} {exchange} says how a grid exchanges: give {GRID_FLAG} m,n with it")
        if order is not None:
            raise ValueError(f"{ORDER_FLAG} {order} says how a grid's ranks lie: give {GRID_FLAG} m,n with it")
        return None
    _check_sizes(args)
    given = args.tensor_model_parallel_size
    if given == 1 and not any(word.split("=")[0] == TP_FLAG for word in argv):
        given = None
    head_dim = replace(_read(args, text.strip(), given), exchange=exchange or AUTO, order=order or DIM_INNERMOST)
    head_dim.check_tensor_parallel_size(given)
    # Not known, or not yet a namespace of their own, before Megatron-LM's own validation.
    view = _model_view(args)
    shape = _shape(args, view, head_dim)
    refusals = [*_refusals(args, view, head_dim), *unsupported(view, head_dim, shape)]
    if refusals:
        raise RefusedError(refusals, f"{GRID_FLAG} {head_dim.flag}: ")
    head_dim.check_world_size(args.world_size, args.pipeline_model_parallel_size, args.context_parallel_size)
    if _heads_known(args, view):
        latent = getattr(args, "multi_latent_attention", False)
        head_dim.check_heads(
            args.num_attention_heads, view.num_query_groups, head_dim.n if latent else view.kv_channels
        )
    if shape is not None:
        head_dim.check_shape(shape)
    args.tensor_model_parallel_size = head_dim.size
    record_head_dim(args, head_dim)
    return head_dim


def _check_sizes(args: argparse.Namespace) -> None:
    # Megatron-LM looks at them later, and what is asked here divides by them.
    for name in (*_SIZES, *(("num_query_groups",) if args.group_query_attention else ())):
        value = getattr(args, name)
        if value is not None and not 0 < value < 2**63:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {shown(value)}")
    if not 0 < args.rotary_percent <= 1:
        raise ValueError(f"--rotary-percent must be above 0 and at most 1, got {shown(args.rotary_percent)}")


def _read(args: argparse.Namespace, text: str, tensor_parallel_size: int | None) -> HeadDimConfig:
    if text != WIDEST:
        return HeadDimConfig.parse(text)
    if tensor_parallel_size is None:
        raise ValueError(f"{GRID_FLAG} {WIDEST} divides a given TP size into m·n: give {TP_FLAG} too, or m,n instead")
    kv_groups = _query_groups(args)
    if kv_groups is None:
        raise ValueError(f"{GRID_FLAG} {WIDEST} needs to know the number of heads: give --num-attention-heads, or m,n")
    head_dim = HeadDimConfig.widest(tensor_parallel_size, kv_groups)
    if args.rank == 0:
        said = f"m = gcd(TP {tensor_parallel_size}, query groups {kv_groups})"
        print(f"{GRID_FLAG} {WIDEST}: {head_dim.flag} ({said})", flush=True)
    return head_dim


def _query_groups(args: argparse.Namespace) -> int | None:
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def _model_view(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments under the names, and with the defaults, that the model's configuration will have."""
    view = argparse.Namespace(**vars(args))
    view.num_query_groups = _query_groups(args)
    if args.kv_channels is None and args.hidden_size and args.num_attention_heads:
        view.kv_channels = args.hidden_size // args.num_attention_heads
    return view


def _heads_known(args: argparse.Namespace, view: argparse.Namespace) -> bool:
    """Whether the command line alone gives the model's heads."""
    # Heterogeneous models name them per layer, in a file; Megatron-LM itself misses them elsewhere.
    known = None not in (args.num_attention_heads, view.num_query_groups, view.kv_channels)
    return known and not getattr(args, "heterogeneous_layers_config_path", None)


def _shape(args: argparse.Namespace, view: argparse.Namespace, head_dim: HeadDimConfig) -> AttentionShape | None:
    """The shape of an attention layer, as far as the command line alone gives it."""
    b, s = args.micro_batch_size, args.seq_length
    if None in (b, s) or not _heads_known(args, view):
        return None
    rotary = 0
    if args.position_embedding_type != "learned_absolute" or args.use_rotary_position_embeddings:
        rotary = 0 if args.position_embedding_type == "none" else int(view.kv_channels * args.rotary_percent)
    return attention_shape(view, head_dim, b, s // args.context_parallel_size, rotary)


def _refusals(args: argparse.Namespace, view: argparse.Namespace, head_dim: HeadDimConfig) -> Iterator[Refusal]:
    """What Megatron-LM's own arguments ask for and the grid cannot do, beside what the model's configuration shows."""
    for said in unfit(args, head_dim, head_dim.without_slices(args.num_attention_heads, view.num_query_groups)):
        yield Refusal("feature", said)
    if getattr(args, "multi_latent_attention", False) and args.transformer_impl != "local":
        yield Refusal("feature", LATENT_LINEARS)
    if args.transformer_impl == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        yield Refusal(
            "installation",
            "--transformer-impl transformer_engine (the default) needs Transformer Engine, which is not installed: "
            "install it, or give --transformer-impl local",
        )
