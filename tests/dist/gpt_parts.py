"""Which part of each global tensor of a GPTModel a rank holds: to fill it alike everywhere, and to assemble it."""

import zlib
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module

from hp_plugin.attention.layers import HeadDimColumnParallelLinear, HeadDimRowParallelLinear

Part = tuple[torch.Tensor, int | None, list[int] | None]
"""A rank's tensor, the axis it is split on, and the global indices in the order in which TP ranks hold them."""


def global_names(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters under names that count the layers of the whole model, not of this stage."""
    named = {}
    offsets = {f"decoder.layers.{k}.": layer.layer_number - 1 for k, layer in enumerate(model.decoder.layers)}
    for name, param in model.named_parameters():
        for local, number in offsets.items():
            if name.startswith(local):
                name = f"layer {number} {name.removeprefix(local)}"
                break
        # The last stage's copy of the tied embedding.
        if model.share_embeddings_and_output_weights:
            name = name.replace("output_layer.weight", "embedding.word_embeddings.weight")
        named[name] = param
    return named


def split_axis(param: torch.nn.Parameter) -> int | None:
    return param.partition_dim if getattr(param, "tensor_model_parallel", False) else None


def orders_of(model: torch.nn.Module) -> dict[int, list[int]]:
    """For each parameter that TP ranks do not hold in contiguous parts, by id, the global indices in their order."""
    orders = {}
    tp = parallel_state.get_tensor_model_parallel_world_size()
    for path, module in model.named_modules():
        if isinstance(module, HeadDimColumnParallelLinear | HeadDimRowParallelLinear):
            order = module.grid_axis.permutation(module.grid_groups.grid.owners)
        elif path.endswith("linear_fc1") and model.config.gated_linear_unit:
            gate, up = torch.arange(2 * model.config.ffn_hidden_size).chunk(2)
            order = torch.stack((gate.view(tp, -1), up.view(tp, -1)), 1).flatten().tolist()
        else:
            continue
        for param in module.parameters(recurse=False):
            if split_axis(param) is not None:
                orders[id(param)] = order
    return orders


def fill(model: torch.nn.Module) -> None:
    """Draw every weight at its global shape from a generator seeded by its global name, and keep this rank's part."""
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    orders = orders_of(model)
    for name, param in global_names(model).items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        axis, shape = split_axis(param), list(param.shape)
        if axis is not None:
            shape[axis] *= tp
        if "layernorm" in name and name.endswith("weight"):
            whole = 1 + 0.1 * torch.randn(shape, generator=generator)
        else:
            whole = 0.2 * torch.randn(shape, generator=generator)
        if id(param) in orders:
            whole = whole.index_select(axis, torch.tensor(orders[id(param)]))
        with torch.no_grad():
            param.copy_(whole if axis is None else whole.chunk(tp, axis)[rank])


def collect(chunks: list[Any], read: Any) -> dict[str, Part]:
    found = {}
    for chunk in chunks:
        model = chunk.module.module if isinstance(chunk.module, Float16Module) else chunk.module
        orders = orders_of(model)
        for name, param in global_names(model).items():
            found[name] = (read(param).float().cpu().clone(), split_axis(param), orders.get(id(param)))
    return found


def assemble(parts: list[dict[str, Part]], tp: int) -> dict[str, torch.Tensor]:
    """The global tensors, from what the ranks of a world returned (TP ranks are neighbours)."""
    whole: dict[str, torch.Tensor] = {}
    for first in range(0, len(parts), tp):
        for name, (tensor, axis, order) in parts[first].items():
            pieces = [parts[first + r][name][0] for r in range(tp)]
            if axis is None:
                assert all(torch.equal(piece, tensor) for piece in pieces), f"{name} differs within a TP group"
            joined = tensor if axis is None else torch.cat(pieces, axis)
            if order is not None:
                joined = joined.index_select(axis, torch.tensor(order).argsort())
            assert name not in whole or torch.equal(whole[name], joined), f"{name} differs between replicas"
            whole[name] = joined
    return whole
