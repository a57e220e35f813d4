"""Megatron-LM's flags that a grid cannot carry, or has not been seen to carry: said before any group is made.

Read from the parsers of 0.15 to 0.19; a release without a flag has no attribute of its name.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hp_plugin.config import HeadDimConfig
from hp_plugin.refusal import shorten

# Each element of a weight is updated from its own gradient and moments: whose slice it is makes no difference.
ELEMENTWISE_OPTIMIZERS = ("adam", "sgd", "lion")
# `torch` goes by ranks and is held to the same grid when it is loaded; `torch_dist` knows global tensors.
CHECKPOINT_FORMATS = ("torch", "torch_dist")

_PACKS = "packs sequences, whose bounds cut across the share of a slice"
_HYBRID = "builds a HybridModel, whose layers the grid is not put into: use --tensor-model-parallel-size alone"
_GRAPH = "captures one pass as a graph, and which exchange a pass takes is decided anew for each: not tried"


@dataclass(frozen=True)
class _Unfit:
    """One attribute of the parsed arguments, the values that do not fit, and why not."""

    attribute: str
    why: str
    asked: Callable[[Any], bool] = bool
    slices_alone: bool = True
    """With n = 1 every rank holds whole heads, as stock's do, and the flag means what it meant."""

    def said(self, value: Any, whole_heads: str) -> str:
        flag = f"--{self.attribute.replace('_', '-')}"
        given = flag if value is True else f"{flag} {shorten(str(value), 60)}"
        return f"{given} {self.why}" + (f": {whole_heads}" if self.slices_alone else "")


def _beyond(*fitting: Any) -> Callable[[Any], bool]:
    return lambda value: value is not None and value not in fitting


_ON_EVERY_GRID = (
    _Unfit("use_legacy_models", "builds layers that take no spec: leave it out", slices_alone=False),
    _Unfit(
        "use_megatron_fsdp",
        "tells layers that TP shards from those it does not by their classes' names, which the grid's are not among: "
        "use --use-distributed-optimizer",
        slices_alone=False,
    ),
    _Unfit(
        "use_torch_fsdp2",
        "shards the grid's shards again, not tried: use --use-distributed-optimizer",
        slices_alone=False,
    ),
    _Unfit("hybrid_layer_pattern", _HYBRID, slices_alone=False),
    _Unfit("hybrid_override_pattern", _HYBRID, slices_alone=False),
    _Unfit("mtp_hybrid_override_pattern", _HYBRID, slices_alone=False),
    _Unfit("is_hybrid_model", _HYBRID, slices_alone=False),
    _Unfit("hybrid_attention_ratio", _HYBRID, slices_alone=False),
    _Unfit("hybrid_mlp_ratio", _HYBRID, slices_alone=False),
)
_ON_SLICES = (
    _Unfit("sft", _PACKS),
    _Unfit("hybrid_context_parallel", _PACKS),
    _Unfit("dataloader_inter_document_masking", _PACKS),
    _Unfit(
        "optimizer",
        f"works on whole weight matrices, which slices of heads are not (elementwise are "
        f"{', '.join(ELEMENTWISE_OPTIMIZERS)})",
        _beyond(*ELEMENTWISE_OPTIMIZERS),
    ),
    _Unfit("ckpt_format", "names a rank's tensors by the rank, not by the grid", _beyond(*CHECKPOINT_FORMATS)),
    _Unfit("non_persistent_ckpt_type", "keeps a rank's tensors without saying of which grid", _beyond("global")),
    _Unfit("cuda_graph_impl", _GRAPH, _beyond("none")),
    _Unfit("enable_cuda_graph", _GRAPH),
    _Unfit("external_cuda_graph", _GRAPH),
    _Unfit("inference_dynamic_batching", "batches requests of changing number, which do not split into n"),
    _Unfit("perform_rl_step", "generates with dynamic batches, which do not split into n"),
)


def unfit(args: argparse.Namespace, head_dim: HeadDimConfig, whole_heads: str) -> Iterator[str]:
    """What the parsed arguments ask for and this grid cannot do, in words; nothing if all is well.

    Args:
        args: what Megatron-LM's parser returned, before its own validation.
        whole_heads: the way out of what slices of heads cannot do.
    """
    for row in (*_ON_EVERY_GRID, *(_ON_SLICES if head_dim.n > 1 else ())):
        value = getattr(args, row.attribute, None)
        if value is not None and row.asked(value):
            yield row.said(value, whole_heads)
    experts = getattr(args, "expert_tensor_parallel_size", None) or head_dim.size
    for attribute, held in (
        ("tensor_parallel_num_weight_shards", head_dim.size),
        ("expert_tensor_parallel_num_weight_shards", experts),
    ):
        shards = getattr(args, attribute, None)
        if shards is not None and shards != held:
            yield (
                f"--{attribute.replace('_', '-')} {shards} shards weights over more than the {held} ranks that hold "
                "them here (GTP), and its pieces lie across the grid's: leave it out"
            )
