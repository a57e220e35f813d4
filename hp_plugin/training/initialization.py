"""Initial weights that do not depend on the layout: a generator per parameter, seeded by the parameter's global name.

Every parameter is drawn whole, from the distribution stock Megatron-Core would draw it from, and cut to the part this
rank holds. TP, PP, the interleaved schedule and the grid then all start from one and the same model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from hp_plugin.training.moe import global_expert

Distribution = Callable[[Tensor], object]

# DeepSpeed-MoE's names and Megatron's for the same weights.
_GATE = re.compile(r"\.mlp\.deepspeed_moe\.gate\.wg\.")
_EXPERT = re.compile(r"\.mlp\.(?:deepspeed_moe\.experts\.deepspeed_experts|experts\.local_experts)\.(\d+)\.")


def initialize_parameters(chunks: Iterable[GPTModel], config: TransformerConfig, seed: int) -> None:
    """Fills every parameter of this rank's model chunks in place.

    Raises:
        ValueError: a parameter has no known distribution or sharding here (nothing may stay at chance).
    """
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    tensor_size = parallel_state.get_tensor_model_parallel_world_size()
    expert_rank = parallel_state.get_expert_tensor_parallel_rank()
    expert_size = parallel_state.get_expert_tensor_parallel_world_size()
    for chunk in chunks:
        for name, module, parameter in named_global_parameters(chunk):
            rank, size = (expert_rank, expert_size) if ".mlp.experts." in name else (tensor_rank, tensor_size)
            axis, owned = owned_indices(name, module, parameter, config, rank, size)
            shape = list(parameter.shape)
            if axis is not None:
                shape[axis] *= size
            whole = draw(name, shape, distribution(name, parameter, config), seed)
            part = whole if axis is None else whole.index_select(axis, owned)
            with torch.no_grad():
                parameter.copy_(part)


def named_global_parameters(chunk: GPTModel) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Parameters of a model chunk with their owning modules, under the names they have in the whole model.

    Layers carry their number in the whole model, counted from 0, experts theirs in the whole layer, whoever runs them,
    and the last stage's copy of tied embeddings has the name of the embeddings.
    """
    for path, module in chunk.named_modules():
        for leaf, parameter in module.named_parameters(prefix=path, recurse=False):
            name = re.sub(
                r"^decoder\.layers\.(\d+)\.",
                lambda found: f"decoder.layers.{chunk.decoder.layers[int(found[1])].layer_number - 1}.",
                leaf,
            )
            if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"
            yield _EXPERT.sub(partial(_numbered, chunk.config), _GATE.sub(".mlp.router.", name)), module, parameter


def _numbered(config: TransformerConfig, expert: re.Match[str]) -> str:
    return f".mlp.experts.{global_expert(int(expert[1]), config.num_moe_experts)}."


def owned_indices(
    name: str, module: nn.Module, parameter: nn.Parameter, config: TransformerConfig, rank: int, size: int
) -> tuple[int | None, Tensor]:
    """The sharded axis of a parameter (None: every rank holds it whole) and the global indices this rank has of it."""
    if not getattr(parameter, "tensor_model_parallel", False) or size == 1:
        return None, torch.empty(0, dtype=torch.long)
    axis, length = parameter.partition_dim, parameter.shape[parameter.partition_dim]
    owned = getattr(module, "owned", None)  # grid layers know their block of the stock weight
    if owned is not None:
        return axis, torch.as_tensor(owned, dtype=torch.long)
    if config.gated_linear_unit and ".linear_fc1." in name:
        # Gate and up projection are stacked in one weight, and each is split by itself.
        half = length // 2
        part = torch.arange(rank * half, (rank + 1) * half)
        return axis, torch.cat((part, part + half * size))
    return axis, torch.arange(rank * length, (rank + 1) * length)


def distribution(name: str, parameter: nn.Parameter, config: TransformerConfig) -> Distribution:
    """The distribution stock Megatron-Core initializes this parameter from.

    Raises:
        ValueError: none is known for this name.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf.endswith("bias"):
        return nn.init.zeros_
    if parameter.dim() == 1 and leaf.endswith("weight") and "norm" in name:
        return nn.init.zeros_ if config.layernorm_zero_centered_gamma else nn.init.ones_
    if name.endswith((".linear_proj.weight", ".linear_fc2.weight")):
        return config.output_layer_init_method
    if name.startswith("embedding."):
        return config.embedding_init_method
    if name.endswith((".linear_qkv.weight", ".linear_fc1.weight", ".mlp.router.weight", "output_layer.weight")):
        return config.init_method
    raise ValueError(f"the reference trainer does not know how to initialize {name} {tuple(parameter.shape)}")


def draw(name: str, shape: list[int], fill: Distribution, seed: int) -> Tensor:
    """A whole parameter in fp32 on the CPU, as `fill` leaves it with a generator seeded by the seed and the name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    whole = torch.empty(shape, dtype=torch.float32, device="cpu")
    generator = torch.default_generator  # what Megatron's init methods draw from; they take no other
    state = generator.get_state()
    try:
        generator.manual_seed(int.from_bytes(digest[:4], "little"))
        fill(whole)
    finally:
        generator.set_state(state)
    return whole
