"""A small trained model on any layout, and its global tensors put together without dist_checkpointing."""

from __future__ import annotations

import gc
import multiprocessing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from hp_plugin import cpu_backend
from hp_plugin.attention.layers import HeadDimColumnParallelLinear, HeadDimRowParallelLinear
from hp_plugin.grid.ranks import DIM_INNERMOST
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.data import Batches
from hp_plugin.training.distributed import running_ranks
from hp_plugin.training.step import StepResult, Trainer, build_trainer, train_step
from hp_plugin.training.transformer import build_transformer_config
from tests.ranks import destroy_groups_but

SEQUENCE = 16
BATCH = 8


@dataclass(frozen=True)
class Layout:
    """One way to spread the model over the ranks; the rest of the world is data-parallel."""

    grid: str | None = None
    tp: int | None = None
    pp: int = 1
    chunk_layers: int | None = None
    exchange: str = "auto"
    order: str = DIM_INNERMOST

    @property
    def label(self) -> str:
        size = self.grid.replace(",", "x") if self.grid else f"tp{self.tp or 1}"
        stages = f"-pp{self.pp}" if self.pp > 1 else ""
        order = f"-{self.order}" if self.order != DIM_INNERMOST else ""
        local = "-local" if self.exchange == "local" else ""
        return size + order + stages + ("-vpp" if self.chunk_layers else "") + local


STOCK = Layout()
LAYOUTS = (
    Layout(tp=2),
    Layout(pp=2),
    Layout(tp=2, pp=2),
    Layout(pp=2, chunk_layers=1),
    Layout("2,2"),
    Layout("1,4"),
    Layout("4,1"),
    Layout("2,1"),
    Layout("1,2", pp=2, chunk_layers=1),
)

MODELS: dict[str, dict[str, Any]] = {
    "gqa-bias": {"num_query_groups": 4, "add_qkv_bias": True, "swiglu": True},
    "mha-qknorm": {"qk_layernorm": True, "normalization": "RMSNorm", "untie_embeddings_and_output_weights": True},
    "gated": {"num_query_groups": 4, "attention_output_gate": True, "disable_bias_linear": True},
}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True, "initial_loss_scale": 64.0},
    "distributed": {"use_distributed_optimizer": True},
    "distributed-bf16": {"use_distributed_optimizer": True, "bf16": True},
}


def training_config(layout: Layout = STOCK, **options: Any) -> TrainingConfig:
    """The common model, 4 layers of 8 heads of 8 channels, on one layout."""
    return TrainingConfig(
        **{
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 8,
            "kv_channels": 8,
            "ffn_hidden_size": 48,
            "seq_length": SEQUENCE,
            "vocab_size": 63,
            "make_vocab_size_divisible_by": 64,
            "position_embedding_type": "rope",
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "micro_batch_size": 2,
            "global_batch_size": BATCH,
            "train_iters": 10,
            "lr": 1e-2,
            "mock_data": True,
            "tensor_model_parallel_size": layout.tp,
            "pipeline_model_parallel_size": layout.pp,
            "num_layers_per_virtual_pipeline_stage": layout.chunk_layers,
            "head_dim_parallel": layout.grid,
            "head_dim_exchange": layout.exchange,
            "head_dim_order": layout.order,
            **options,
        }
    )


def quick_results_queue() -> Any:
    """What Megatron-Core's writers report to, in a process forked in a moment; its own starts Python and torch anew."""
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    # The process groups that it inherits have lost their threads: collecting one as garbage would crash it.
    manager.start(gc.disable)
    return manager.Queue()


@contextmanager
def trainer_on(config: TrainingConfig) -> Iterator[Trainer]:
    """A trainer on running ranks; nothing of it is left after the block."""
    cpu_backend.enable()
    # Megatron-Core writes files from processes of its own, which multiprocessing denies to the harness' daemons.
    multiprocessing.current_process()._config["daemon"] = False
    filesystem_async._results_queue = quick_results_queue()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*local is another function", category=UserWarning)
        transformer_config = build_transformer_config(config)
        try:
            with running_ranks(config) as device:
                yield build_trainer(config, transformer_config, device)
        finally:
            # Ends the process behind it, which would outlive the harness' killed ranks.
            filesystem_async._results_queue = None
            destroy_groups_but(dist.group.WORLD)


def token_batches(config: TrainingConfig, iteration: int) -> Batches:
    """This rank's micro-batches of one global batch, the same on every layout."""
    tokens = torch.randint(56, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(iteration))
    dp, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = tokens.view(-1, dp, config.micro_batch_size, SEQUENCE + 1)[:, rank]

    def read() -> Iterator[dict[str, Tensor]]:
        for micro in mine:
            yield {
                "tokens": micro[:, :-1].contiguous(),
                "labels": micro[:, 1:].contiguous(),
                "loss_mask": torch.ones(config.micro_batch_size, SEQUENCE),
                "position_ids": torch.arange(SEQUENCE).expand(config.micro_batch_size, -1).contiguous(),
            }

    return [read() for _ in range(config.virtual_pipeline)] if config.virtual_pipeline else read()


def step(trainer: Trainer, iteration: int) -> StepResult:
    """One training step on the batch of this number."""
    return train_step(trainer, token_batches(trainer.config, iteration))


def loss_of(result: StepResult) -> float:
    """The loss, known to all ranks."""
    loss = torch.zeros(()) if result.lm_loss is None else result.lm_loss.detach().clone()
    dist.all_reduce(loss, dist.ReduceOp.MAX)
    return float(loss)


def scramble(trainer: Trainer) -> None:
    """Overwrites parameters and optimizer state, so that a load that leaves something out shows."""
    with torch.no_grad():
        for chunk in trainer.model:
            for parameter in chunk.parameters():
                parameter.fill_(7.0)
        for optimizer in optimizers(trainer):
            for tensor in chain.from_iterable(_state(optimizer, p).values() for p in _tracked(optimizer)):
                tensor.fill_(9.0)


def optimizers(trainer: Trainer) -> list[Any]:
    """The optimizers of this rank."""
    return list(getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]))


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """Every global parameter, fp32 copy and Adam moment, by global name; on every rank, None axes checked equal."""
    mine: list[tuple[str, str, Tensor, list[int], int, list[int] | int]] = []
    for chunk in trainer.model:
        model = chunk
        while hasattr(model, "module"):
            model = model.module
        for name, parameter in _global_names(model).items():
            axis, place = _place(model, parameter)
            mine.append((name, "param", parameter.detach().clone(), [], axis, place))
            for optimizer in optimizers(trainer):
                if parameter not in _tracked(optimizer):
                    continue
                shape, span = list(parameter.shape), _span(optimizer, parameter)
                for kind, tensor in _state(optimizer, parameter).items():
                    mine.append((name, kind, tensor.detach().clone(), [*shape, *span], axis, place))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return _assemble(everyone)


def _assemble(everyone: list[Any]) -> dict[str, Tensor]:
    # Flat shares of the distributed optimizer first become whole local tensors, per place in the global tensor.
    local: dict[tuple[str, str, int, str], Tensor] = {}
    places: dict[tuple[str, str, int, str], Any] = {}
    for name, kind, tensor, flat, axis, place in chain.from_iterable(everyone):
        key = (name, kind, axis, str(place))
        places[key] = place
        if flat and tensor.ndim == 1 and flat[-2:] != [-1, -1]:
            *shape, start, end = flat
            whole = local.setdefault(key, torch.full(shape, torch.nan, dtype=tensor.dtype))
            whole.view(-1)[start:end] = tensor
            continue
        if key in local:
            assert torch.equal(local[key], tensor), f"{name} ({kind}) differs between replicas"
        local[key] = tensor
    result: dict[str, Tensor] = {}
    for (name, kind, axis, _), tensor in local.items():
        place = places[(name, kind, axis, _)]
        full = f"{name} ({kind})"
        if axis < 0:
            assert full not in result or torch.equal(result[full], tensor), f"{full} differs between replicas"
            result[full] = tensor
            continue
        indices, size = place
        shape = list(tensor.shape)
        shape[axis] = size
        whole = result.setdefault(full, torch.full(shape, torch.nan, dtype=tensor.dtype))
        whole.index_copy_(axis, torch.tensor(indices), tensor)
    holes = [name for name, tensor in result.items() if tensor.isnan().any()]
    assert not holes, f"nobody holds all of {holes}"
    return result


def _global_names(model: nn.Module) -> dict[str, nn.Parameter]:
    named: dict[str, nn.Parameter] = {}
    offsets = {f"decoder.layers.{k}.": layer.layer_number - 1 for k, layer in enumerate(model.decoder.layers)}
    for name, parameter in model.named_parameters():
        for local, number in offsets.items():
            if name.startswith(local):
                name = f"layer {number} {name.removeprefix(local)}"
                break
        if model.share_embeddings_and_output_weights and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        named[name] = parameter
    return named


def _place(model: nn.Module, parameter: nn.Parameter) -> tuple[int, Any]:
    """The sharded axis (-1: none), and the stock indices of it that this rank holds with the axis' whole length."""
    axis = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else -1
    if axis < 0:
        return -1, None
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    for name, module in model.named_modules():
        if any(parameter is own for own in module.parameters(recurse=False)):
            if isinstance(module, (HeadDimColumnParallelLinear, HeadDimRowParallelLinear)):
                return axis, (list(module.owned), module.grid_axis.global_size)
            size = parameter.shape[axis]
            if name.endswith("linear_fc1") and module.config.gated_linear_unit:
                half = size // 2
                first = list(range(rank * half, (rank + 1) * half))
                return axis, (first + [tp * half + k for k in first], tp * size)
            return axis, (list(range(rank * size, (rank + 1) * size)), tp * size)
    raise AssertionError("a parameter without a module")


def _tracked(optimizer: Any) -> Any:
    if isinstance(optimizer, DistributedOptimizer):
        return _Identity(
            p for groups in (optimizer.model_float16_groups, optimizer.model_fp32_groups) for g in groups for p in g
        )
    groups = getattr(optimizer, "float16_groups", None)
    if groups is not None:
        return _Identity(p for g in (*groups, *optimizer.fp32_from_fp32_groups) for p in g)
    return _Identity(p for g in optimizer.optimizer.param_groups for p in g["params"])


class _Identity(list):
    """Membership by identity: tensors compare elementwise."""

    def __contains__(self, item: object) -> bool:
        return any(item is own for own in self)


def _span(optimizer: Any, parameter: nn.Parameter) -> list[int]:
    if not isinstance(optimizer, DistributedOptimizer):
        return [-1, -1]
    held = optimizer._get_model_param_range_map(parameter)["param"]
    return [held.start, held.end]


def _state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """fp32 copy and moments that this rank keeps of a parameter."""
    if isinstance(optimizer, DistributedOptimizer):
        group, order = optimizer.model_param_group_index_map[parameter]
        main = optimizer.optimizer.param_groups[group]["params"][order]
    else:
        main = getattr(parameter, "main_param", parameter)
    state = {k: v for k, v in optimizer.optimizer.state.get(main, {}).items() if k in ("exp_avg", "exp_avg_sq")}
    return {"fp32": main, **state}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bit-identical, or that only one side has."""
    return [
        name
        for name in sorted(found.keys() | expected.keys())
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    ]


def but(layout: Layout, **changes: Any) -> Layout:
    """The layout with changes."""
    return replace(layout, **changes)


def folder_of(path: str | Path, name: str) -> str:
    """A new empty folder that all ranks see."""
    folder = Path(path) / name
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    return str(folder)
