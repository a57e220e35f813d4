"""One attention layer on the grid beside stock Megatron-Core at TP = 1, in the same world of ranks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from hp_plugin.attention.registration import initialize_head_dim_parallel
from hp_plugin.attention.specs import head_dim_spec
from hp_plugin.attention.transformer_config import HeadDimTransformerConfig
from hp_plugin.config import HeadDimConfig
from hp_plugin.grid.ranks import DIM_INNERMOST
from tests.ranks import prepare_device


@dataclass(frozen=True)
class Case:
    """A layer, its grid and its micro-batch; `config` goes to TransformerConfig, `rope` to RotaryEmbedding."""

    m: int
    n: int
    exchange: str
    h: int = 4
    g: int = 2
    d: int = 8
    s: int = 12
    b: int = 2
    hidden: int = 20
    config: dict[str, Any] = field(default_factory=dict)
    rope: dict[str, Any] | None = None
    mask: str = "causal"
    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    order: str = DIM_INNERMOST

    @property
    def label(self) -> str:
        features = [f"{k}={v}" for k, v in {**self.config, **(self.rope or {})}.items()]
        features += ["rope"] if self.rope is not None else []
        features += [self.mask] if self.mask != "causal" else []
        features += ["sp"] if self.sequence_parallel else []
        features += [self.order] if self.order != DIM_INNERMOST else []
        features += [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []
        shape = f"h{self.h}g{self.g}d{self.d}s{self.s}b{self.b}"
        return "-".join([self.exchange, f"{self.m}x{self.n}", shape, *features])


@dataclass
class Result:
    """What one run of a layer produced: output (bias added), input gradient, parameters and their gradients."""

    output: Tensor
    grad_input: Tensor
    parameters: dict[str, Tensor]
    grads: dict[str, Tensor]


def build(case: Case, head_dim: HeadDimConfig | None, h: int, g: int, d: int) -> nn.Module:
    """The layer's attention from one CPU seed, with biases and norms moved off their trivial start."""
    common: dict[str, Any] = dict(
        num_layers=2,  # more than one, so that output_layer_init_method differs from init_method
        hidden_size=case.hidden,
        num_attention_heads=h,
        num_query_groups=g,
        kv_channels=d,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        rotary_interleaved=bool(case.rope and case.rope.get("rotary_interleaved")),
        params_dtype=case.dtype,
        bf16=case.dtype == torch.bfloat16,
        fp16=case.dtype == torch.float16,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=False,
        **{"attention_dropout": 0.0, **{k: v for k, v in case.config.items() if not k.startswith("yarn_")}},
    )
    # Megatron-LM sets these on a configuration that has no such fields.
    yarn = {name: value for name, value in case.config.items() if name.startswith("yarn_")}
    if head_dim is None:
        config = TransformerConfig(**common)
    else:
        config = HeadDimTransformerConfig(
            **common,
            tensor_model_parallel_size=head_dim.size,
            sequence_parallel=case.sequence_parallel,
            head_dim_parallel=head_dim,
        )
    vars(config).update(yarn)
    spec = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        **({"qk_l2_norm": True} if config.qk_l2_norm else {}),
    )
    if head_dim is not None:
        spec = head_dim_spec(spec, config)
        spec = spec if not hasattr(spec, "layer_specs") else spec.layer_specs[0]
    attention = spec.submodules.self_attention
    attention.params["attn_mask_type"] = AttnMaskType.causal if case.mask == "causal" else AttnMaskType.arbitrary
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)
    return build_module(
        attention,
        config=config,
        layer_number=1,
        pg_collection=None,
    ).cuda()


def angles(case: Case, d: int) -> Tensor | None:
    """Rotary angles for all s positions."""
    if case.rope is None:
        return None
    settings = {"rotary_percent": 1.0, **case.rope}
    yarn = {name.removeprefix("yarn_"): value for name, value in case.config.items() if name.startswith("yarn_")}
    if yarn:
        factor = yarn.pop("rotary_scaling_factor")
        given = {**settings, **yarn, "scaling_factor": factor, "use_cpu_initialization": True}
        return YarnRotaryEmbedding(d, **given)(case.s)[0]
    if settings.pop("per_sample", False):  # multimodal rotary embedding: positions differ by sample
        whole = RotaryEmbedding(d, use_cpu_initialization=True, **settings)(case.s)
        return torch.cat([whole.roll(sample, 0) for sample in range(case.b)], dim=1)
    return RotaryEmbedding(d, use_cpu_initialization=True, **settings)(case.s)


def attention_mask(case: Case) -> Tensor | None:
    """None for causal; `padding` [b, 1, 1, s]; `arbitrary` [b, 1, s, s] with one query that sees nothing."""
    generator = torch.Generator().manual_seed(7)
    if case.mask == "causal":
        return None
    if case.mask == "padding":
        lengths = torch.randint(1, case.s + 1, (case.b,), generator=generator)
        return (torch.arange(case.s) >= lengths[:, None])[:, None, None, :].cuda()
    shared = 1 if case.mask == "shared" else case.b
    mask = torch.rand((shared, 1, case.s, case.s), generator=generator) < 0.4
    mask[0, 0, case.s // 2] = True
    return mask.cuda()


def data(case: Case) -> tuple[Tensor, Tensor]:
    """Input and output weights `[s, b, D]`, equal on all ranks."""
    generator = torch.Generator().manual_seed(99)
    shape = (2, case.s, case.b, case.hidden)
    return tuple(torch.randn(shape, generator=generator).to(case.dtype).cuda())  # type: ignore[return-value]


def step(module: nn.Module, inputs: Tensor, weights: Tensor, mask: Tensor | None, rope: Tensor | None) -> Result:
    """Forward and backward of sum(output · weights)."""
    inputs = inputs.clone().requires_grad_()
    output, bias = module(inputs, mask, rotary_pos_emb=rope)
    output = output if bias is None else output + bias
    (output.float() * weights.float()).sum().backward()
    assert inputs.grad is not None
    named = dict(module.named_parameters())
    missing = [name for name, parameter in named.items() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}"
    return Result(
        output.detach(),
        inputs.grad,
        {name: parameter.detach().clone() for name, parameter in named.items()},
        {name: parameter.grad.detach().clone() for name, parameter in named.items()},
    )


def reference(case: Case, dtype: torch.dtype | None = None) -> Result:
    """Stock attention at TP = 1 (`local`: with h · n heads and g · n groups of d/n); optionally in another dtype."""
    parallel_state.initialize_model_parallel()
    cut = case.n if case.exchange == "local" else 1
    module = build(case, None, case.h * cut, case.g * cut, case.d // cut)
    _move_off_trivial(module)
    if dtype is not None:
        module.to(dtype)
        module.config.bf16 = module.config.fp16 = False
        module.core_attention.scale_mask_softmax.input_in_float16 = False
    inputs, weights = (tensor.to(dtype or case.dtype) for tensor in data(case))
    result = step(module, inputs, weights, attention_mask(case), angles(case, case.d // cut))
    parallel_state.destroy_model_parallel()
    return result


def on_grid(case: Case, stock: Result) -> tuple[nn.Module, Result]:
    """The grid's layer with this rank's slices of the reference's parameters."""
    head_dim = HeadDimConfig(case.m, case.n, case.exchange, case.order)
    initialize_head_dim_parallel(head_dim)
    with warnings.catch_warnings():
        if case.exchange == "local":
            warnings.filterwarnings("ignore", message=".*local is another function", category=UserWarning)
        module = build(case, head_dim, case.h, case.g, case.d)
    initial = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(share(case, module, name, stock.parameters[name]))
    if case.exchange != "local":
        for name in ("linear_qkv.weight", "linear_proj.weight"):
            torch.testing.assert_close(initial[name], module.get_parameter(name), rtol=0, atol=0)
    inputs, weights = data(case)
    rows = own_rows(case)
    result = step(module, inputs[rows], weights[rows], attention_mask(case), angles(case, case.d))
    return module, result


def own_rows(case: Case) -> slice:
    """The tokens this rank holds outside attention."""
    if not case.sequence_parallel:
        return slice(None)
    size, rank = case.s // (case.m * case.n), parallel_state.get_tensor_model_parallel_rank()
    return slice(rank * size, (rank + 1) * size)


def share(case: Case, module: nn.Module, name: str, whole: Tensor) -> Tensor:
    """This rank's part of a tensor of the reference."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), case.m * case.n
    layer = name.partition(".")[0]
    if layer not in ("linear_qkv", "linear_proj") or name == "linear_proj.bias":
        return whole
    axis = 0 if layer == "linear_qkv" else 1
    if case.exchange == "local":
        return whole.chunk(size, dim=axis)[rank]  # the literal method's heads are the ranks' slices, in TP order
    return whole.index_select(axis, torch.tensor(module.get_submodule(layer).owned).cuda())


def _move_off_trivial(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" in name or "layernorm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).cuda())


def differences(case: Case) -> dict[str, float]:
    """Largest difference over largest reference value, for the output and every gradient; all ranks' maximum."""
    prepare_device()
    stock = reference(case)
    module, grid = on_grid(case, stock)
    rows = own_rows(case)
    found = {
        "output": relative(grid.output, stock.output[rows]),
        "input": relative(grid.grad_input, stock.grad_input[rows]),
    }
    for name, gradient in grid.grads.items():
        # Megatron's gradient finalization sums these: by name, and what sequence parallelism marked.
        if "layernorm" in name or getattr(module.get_parameter(name), "sequence_parallel", False):
            dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
        found[name] = relative(gradient, share(case, module, name, stock.grads[name]))
    parallel_state.destroy_model_parallel()
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over largest reference value."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
    scale = expected.float().abs().max().item()
    assert scale > 0, "a reference of zeros shows nothing"
    return (found.float() - expected.float()).abs().max().item() / scale
