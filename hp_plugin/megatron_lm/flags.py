"""The plugin's flags in Megatron-LM's parser, and everything about them that can be refused before training starts."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from typing import Any

from hp_plugin.attention.transformer_config import attention_shape, unsupported
from hp_plugin.checkpoint.rules import OVERRIDE_FLAG, record_head_dim
from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.rules import EXCHANGES

GRID_FLAG, EXCHANGE_FLAG, TP_FLAG = "--head-dim-parallel", "--head-dim-exchange", "--tensor-model-parallel-size"
AUTO = "auto"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the flags to a parser; where they are not given, the namespace stays without them."""
    group = parser.add_argument_group(title="head × dimension parallelism")
    group.add_argument(
        GRID_FLAG,
        metavar="M,N",
        default=argparse.SUPPRESS,
        help="Run attention on M groups of heads times N slices of the head dimension; sets "
        f"{TP_FLAG} to M·N. '{AUTO}' picks the widest head axis, M = gcd(TP, query groups), for a given {TP_FLAG}.",
    )
    group.add_argument(
        EXCHANGE_FLAG,
        choices=EXCHANGES,
        default=argparse.SUPPRESS,
        help="How the N slices of a head meet: 'batch' trades slices for full heads of a share of the samples, "
        "'sequence' of the queries, 'scores' sums partial scores, 'auto' (default) takes the first of these that "
        "fits. 'local' exchanges nothing and is another function: attention with N times as many, narrower heads.",
    )
    group.add_argument(
        OVERRIDE_FLAG,
        action="store_true",
        default=argparse.SUPPRESS,
        help="Load a checkpoint that was trained with the exchange 'local' on other slices, or with an exact exchange, "
        "although its weights then compute another function.",
    )
    return parser


def settle(args: argparse.Namespace, argv: Sequence[str]) -> HeadDimConfig | None:
    """Reads the grid from parsed arguments, checks it against all others and sets the TP size; None without a grid.

    On a grid `args.head_dim_parallel` becomes "m,n" and `args.head_dim_exchange` is set, which is how Megatron-LM
    prints them and records them in its checkpoints.

    Args:
        args: what Megatron-LM's parser returned, before its own validation.
        argv: the words it was parsed from, which tell a given TP size from the default one.

    Raises:
        ValueError: flags contradict each other, or ask for what the grid cannot do.
    """
    text, exchange = getattr(args, "head_dim_parallel", None), getattr(args, "head_dim_exchange", None)
    if text is None:
        if exchange is not None:
            raise ValueError(f"{EXCHANGE_FLAG} {exchange} says how a grid exchanges: give {GRID_FLAG} m,n with it")
        return None
    given = args.tensor_model_parallel_size
    if given == 1 and not any(word.split("=")[0] == TP_FLAG for word in argv):
        given = None
    grid = _grid(args, text.strip(), exchange or AUTO, given)
    grid.check_tensor_parallel_size(given)
    # Not known, or not yet a namespace of their own, before Megatron-LM's own validation.
    view = _model_view(args)
    refusals = [*_refusals(args, grid), *unsupported(view, grid, grid.exchange)]
    if refusals:
        raise ValueError(f"{GRID_FLAG} {grid.m},{grid.n}: " + "; ".join(refusals))
    grid.check_world_size(args.world_size, args.pipeline_model_parallel_size, args.context_parallel_size)
    _check_attention(args, view, grid)
    args.tensor_model_parallel_size = grid.size
    record_head_dim(args, grid)
    return grid


def _grid(args: argparse.Namespace, text: str, exchange: str, tensor_parallel_size: int | None) -> HeadDimConfig:
    if text != AUTO:
        return HeadDimConfig.parse(text, exchange)
    if tensor_parallel_size is None:
        raise ValueError(f"{GRID_FLAG} {AUTO} divides a given TP size into m·n: give {TP_FLAG} too, or m,n instead")
    groups = _query_groups(args)
    if groups is None:
        raise ValueError(f"{GRID_FLAG} {AUTO} needs to know the number of heads: give --num-attention-heads, or m,n")
    grid = HeadDimConfig.widest(tensor_parallel_size, groups, exchange)
    if args.rank == 0:
        print(
            f"{GRID_FLAG} {AUTO}: {grid.m},{grid.n} (m = gcd(TP {tensor_parallel_size}, query groups {groups}))",
            flush=True,
        )
    return grid


def _query_groups(args: argparse.Namespace) -> int | None:
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def _model_view(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments under the names, and with the defaults, that the model's configuration will have."""
    view = argparse.Namespace(**vars(args))
    view.num_query_groups = _query_groups(args)
    if args.kv_channels is None and args.hidden_size and args.num_attention_heads:
        view.kv_channels = args.hidden_size // args.num_attention_heads
    return view


def _check_attention(args: argparse.Namespace, view: argparse.Namespace, grid: HeadDimConfig) -> None:
    """Heads and exchange against the model's shape, as far as the command line alone gives it."""
    h, g, d = args.num_attention_heads, view.num_query_groups, view.kv_channels
    # Heterogeneous models name them per layer, in a file; Megatron-LM itself misses them elsewhere.
    if None in (h, g, d) or getattr(args, "heterogeneous_layers_config_path", None):
        return
    grid.check_heads(h, g, d)
    b, s = args.micro_batch_size, args.seq_length
    if None in (b, s) or grid.n == 1:
        return
    rotary = 0
    if args.position_embedding_type != "learned_absolute" or args.use_rotary_position_embeddings:
        rotary = 0 if args.position_embedding_type == "none" else int(d * args.rotary_percent)
    shape = attention_shape(view, grid, b, s // args.context_parallel_size, rotary)
    exchange = grid.check_shape(shape)
    refusals = unsupported(view, grid, exchange)
    if refusals:
        raise ValueError(
            f"{GRID_FLAG} {grid.m},{grid.n} with --micro-batch-size {b} and --seq-length {s} needs exchange "
            f"`{exchange}`: " + "; ".join(refusals)
        )


def _refusals(args: argparse.Namespace, grid: HeadDimConfig) -> list[str]:
    """What Megatron-LM's own arguments ask for and the grid cannot do, beside what the model's configuration shows."""
    said = []
    if getattr(args, "use_legacy_models", False):
        said.append("--use-legacy-models builds layers that take no spec: leave it out")
    if args.transformer_impl == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        said.append(
            "--transformer-impl transformer_engine (the default) needs Transformer Engine, which is not installed: "
            "install it, or give --transformer-impl local"
        )
    if grid.n == 1:
        return said
    for flag, set_ in _whole_heads(args):
        if set_:
            said.append(f"{flag}: use a grid with n=1")
    return said


def _whole_heads(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """Flags that cannot run on slices of heads, with the reason, and whether they are set."""
    return [
        ("--sft packs sequences, whose bounds cut across the share of a slice", getattr(args, "sft", False)),
        (
            "--hybrid-context-parallel packs sequences, whose bounds cut across the share of a slice",
            getattr(args, "hybrid_context_parallel", False),
        ),
        (
            f"--optimizer {args.optimizer} orthogonalizes whole heads, which a slice of heads is not",
            "muon" in str(args.optimizer),
        ),
        (
            "--inference-dynamic-batching batches requests of changing number, which do not split into n",
            getattr(args, "inference_dynamic_batching", False),
        ),
    ]
