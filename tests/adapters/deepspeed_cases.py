"""The GPT of the layout tests, trained by DeepSpeed's engine on a grid; bodies for the ranks of a test."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel

from hp_plugin import cpu_backend
from hp_plugin.attention.transformer_config import HeadDimTransformerConfig
from hp_plugin.config import HeadDimConfig
from tests.dist.gpt import SEQUENCE, VOCABULARY, Case, layer_spec
from tests.dist.gpt_parts import Part, collect, fill

MICRO_BATCH, GLOBAL_BATCH = 2, 8


@dataclass(frozen=True)
class DeepSpeedCase:
    """A grid and what DeepSpeed does around it; model, global batch and optimizer are those of `tests.dist.gpt`."""

    m: int = 2
    n: int = 2
    exchange: str = "auto"
    order: str = "dim-innermost"
    stage: int = 0
    dtype: torch.dtype = torch.float32
    clip_grad: float = 0.0
    steps: int = 2
    layers: int = 2
    settings: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's configuration."""
    model: dict[str, Any] = field(default_factory=dict)
    """Further fields of TransformerConfig."""

    @property
    def stock(self) -> Case:
        """The same training by Megatron's optimizer on one rank."""
        switched_off = ("sequence_parallel",)
        model = {name: value for name, value in self.model.items() if name not in switched_off}
        return Case(steps=self.steps, layers=self.layers, clip_grad=self.clip_grad, dtype=self.dtype, model=model)

    @property
    def megatron(self) -> Case:
        """The same training by Megatron's optimizer on the same grid."""
        return Case(
            grid=HeadDimConfig(self.m, self.n, self.exchange, self.order),
            tp=self.m * self.n,
            steps=self.steps,
            layers=self.layers,
            clip_grad=self.clip_grad,
            dtype=self.dtype,
            model=self.model,
        )


@dataclass
class EngineOutcome:
    """What one rank saw: values per step, and parameters by global name with the axis they are split on."""

    losses: list[float]
    grad_norms: list[float]
    params: dict[str, Part]


@contextmanager
def deepspeed_rank() -> Iterator[None]:
    """What DeepSpeed demands of a process that no launcher started; forgets its globals afterwards."""
    cpu_backend.enable()
    # Megatron-Core writes checkpoints from processes of its own, which multiprocessing denies to the harness' daemons.
    multiprocessing.current_process()._config["daemon"] = False
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    from deepspeed.utils import groups

    before = dict(vars(groups))
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        for name, value in before.items():
            if not callable(value) and not name.startswith("__"):
                setattr(groups, name, value)


def settings_of(case: DeepSpeedCase) -> dict[str, Any]:
    """The DeepSpeed configuration of a case."""
    parallel = dist.get_world_size() // (case.m * case.n)
    settings: dict[str, Any] = {
        "head_dim_parallel": {"m": case.m, "n": case.n, "exchange": case.exchange, "order": case.order},
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": GLOBAL_BATCH // MICRO_BATCH // parallel,
        "gradient_clipping": case.clip_grad,
        "zero_optimization": {"stage": case.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01, "torch_adam": True}},
    }
    if case.dtype is torch.bfloat16:
        settings["bf16"] = {"enabled": True}
    return settings | case.settings


def build_gpt(case: DeepSpeedCase) -> GPTModel:
    """The bare model, with the weights that every layout of `tests.dist.gpt` starts from."""
    config = HeadDimTransformerConfig(
        head_dim_parallel=HeadDimConfig(case.m, case.n, case.exchange, case.order),
        num_layers=case.layers,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=64,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=case.dtype,
        bf16=case.dtype is torch.bfloat16,
        attention_softmax_in_fp32=True,
        gradient_accumulation_fusion=False,
        **case.model,
    )
    model = GPTModel(
        config,
        layer_spec(config, case.megatron, None),
        VOCABULARY,
        SEQUENCE,
        share_embeddings_and_output_weights=case.stock.tied,
        position_embedding_type=case.stock.positions,
    )
    model.model_type = ModelType.encoder_or_decoder
    fill(model)
    return model


def start_engine(case: DeepSpeedCase, settings: Any = None) -> Any:
    """The engine, as a user starts it: grid from the configuration, model, `initialize`."""
    from hp_plugin.deepspeed_adapter.engine import initialize, initialize_grid

    settings = settings_of(case) if settings is None else settings
    initialize_grid(settings)
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    model = build_gpt(case)
    return initialize(model=model, config=settings)[0]


def run_step(engine: Any, step: int) -> float:
    """One global batch, the one of `tests.dist.gpt.run_step`; the mean loss, on every rank."""
    samples = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY - VOCABULARY // 8, (GLOBAL_BATCH, SEQUENCE + 1), generator=samples)
    parallel, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = tokens.view(-1, parallel, MICRO_BATCH, SEQUENCE + 1)[:, rank]
    positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    total = torch.zeros(())
    for batch in mine:
        loss = engine(batch[:, :-1], positions, mask, labels=batch[:, 1:]).float().mean()
        engine.backward(loss)
        engine.step()
        total += loss.detach()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total) / len(mine) / parallel


def parameters_of(engine: Any) -> dict[str, Part]:
    """Every parameter of the model, gathered from its data-parallel shards where ZeRO-3 has split it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(
        list(engine.module.parameters()), enabled=engine.zero_optimization_stage() == 3
    ):
        return collect([SimpleNamespace(module=engine.module)], lambda parameter: parameter.data)


def run_steps(engine: Any, steps: range) -> EngineOutcome:
    """Trains these steps."""
    outcome = EngineOutcome([], [], {})
    for step in steps:
        outcome.losses.append(run_step(engine, step))
        outcome.grad_norms.append(float(engine.get_global_grad_norm() or 0.0))
    outcome.params = parameters_of(engine)
    return outcome


def train(case: DeepSpeedCase) -> EngineOutcome:
    """Trains `case.steps` steps from the case's configuration."""
    with deepspeed_rank():
        return run_steps(start_engine(case), range(case.steps))
