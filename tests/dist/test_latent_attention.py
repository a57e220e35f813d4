"""Multi-latent attention under `weights` trains as stock's on one rank: losses, gradient norms, gradients, parameters."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from hp_plugin.attention.latent_attention import HeadDimLatentAttention
from hp_plugin.attention.specs import head_dim_spec
from hp_plugin.attention.transformer_config import HeadDimMLATransformerConfig, HeadDimTransformerConfig
from hp_plugin.config import HeadDimConfig
from hp_plugin.refusal import RefusedError
from tests.dist import gpt
from tests.dist.gpt import Case, Outcome
from tests.dist.test_gpt_on_grid import agrees, stock_case
from tests.ranks import Ranks

LATENT = {
    "multi_latent_attention": True,
    # Two heads for four ranks on 2x2: stock could not.
    "num_attention_heads": 2,
    "num_query_groups": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_head_dim": 12,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 10,
    "rope_type": "rope",
    "rotary_percent": 1.0,
    "qk_layernorm": True,
    "add_bias_linear": False,
}


class PlainCore(torch.nn.Module):
    """Attention by its definition, of values narrower than queries and keys, which stock's local core is not made for."""

    def __init__(self, config: Any, softmax_scale: float, **of_stock: Any) -> None:
        super().__init__()
        self.scale, self.dropout, self.sequence_parallel = softmax_scale, config.attention_dropout, config.sequence_parallel

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **of_stock: Any) -> Tensor:
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) * self.scale
        weights = scores.masked_fill(attention_mask, -10000.0).softmax(dim=-1)
        return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


def layer_spec(config: Any, case: Case, vp_stage: int | None) -> Any:
    spec = get_gpt_layer_local_spec(qk_layernorm=True, multi_latent_attention=True)
    if case.grid is not None:
        assert spec.submodules.self_attention.submodules.core_attention is DotProductAttention
        return head_dim_spec(spec, config, vp_stage)
    spec.submodules.self_attention.submodules.core_attention = PlainCore
    return spec


def train(case: Case) -> Outcome:
    """`gpt.train` of a model with multi-latent attention."""
    kept = gpt.layer_spec, gpt.TransformerConfig, gpt.HeadDimTransformerConfig
    gpt.layer_spec, gpt.TransformerConfig = layer_spec, MLATransformerConfig  # type: ignore[assignment,misc]
    gpt.HeadDimTransformerConfig = HeadDimMLATransformerConfig  # type: ignore[misc]
    try:
        return gpt.train(case)
    finally:
        gpt.layer_spec, gpt.TransformerConfig, gpt.HeadDimTransformerConfig = kept  # type: ignore[misc]


def on(m: int, n: int, micro_batch: int = 4, exchange: str = "weights", **fields: Any) -> Case:
    model = {**LATENT, **fields.pop("model", {})}
    return Case(grid=HeadDimConfig(m, n, exchange), tp=m * n, micro_batch=micro_batch, model=model, **fields)


SP = {"sequence_parallel": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES = {
    "2x2": on(2, 2),
    "1x4": on(1, 4, model={"num_attention_heads": 3, "num_query_groups": 3, "kv_channels": 16, "qk_head_dim": 4, "v_head_dim": 12}),
    "2x2 auto, masks of their own": on(2, 2, exchange="auto", own_masks=True),
    "2x2 SP": on(2, 2, model=SP),
    "2x2 by tokens": on(2, 2, 1),
    "1x4 by tokens, SP": on(1, 4, 2, model=SP),
    "2x2 by tokens, SP, recompute layers, queries without latents": on(2, 2, 1, model=SP | FULL | {"q_lora_rank": None}),
    "2x2 recompute up-projections": on(
        2, 2, model={"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]}
    ),
    "2x2 by tokens, ends as stock's, untied": on(2, 2, 1, ends=False, tied=False),
    "1x2 PP=2 interleaved": on(1, 2, 2, pp=2, vp=2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_trains_as_stock_on_one_rank(ranks: Ranks, case: Case) -> None:
    (stock,) = ranks.run(1, train, stock_case(case))
    agrees(case, stock, ranks.run(max(4, case.tp * case.pp), train, case))


def config(exchange: str, order: str = "dim-innermost", m: int = 2, n: int = 2, **fields: Any) -> Any:
    sizes = {"num_layers": 2, "hidden_size": 32, "head_dim_parallel": HeadDimConfig(m, n, exchange, order)}
    return HeadDimMLATransformerConfig(**{**LATENT, **sizes, **fields})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"exchange": "batch"}, "has no per-head slices: .* or --head-dim-exchange weights"),
        ({"exchange": "weights", "n": 1}, "has no per-head slices: use --tensor-model-parallel-size alone$"),
        ({"exchange": "auto", "order": "head-innermost"}, "give --head-dim-order dim-innermost"),
        ({"exchange": "weights", "kv_lora_rank": 18}, "22 channels of latents of keys and values"),
        ({"exchange": "weights", "v_head_dim": 9}, "18 channels of heads of outputs"),
        ({"exchange": "weights", "kv_channels": 9}, "18 channels of heads of kv_channels"),
        ({"exchange": "weights", "m": 4, "n": 1}, "m=4 must divide both"),
        ({"exchange": "weights", "micro_batch_size": 1, "seq_length": 18}, "needs a micro-batch size divisible by n"),
    ],
    ids=str,
)
def test_what_latent_attention_cannot_do_is_refused_in_words(settings: dict[str, Any], said: str) -> None:
    with pytest.raises((RefusedError, ValueError), match=said):
        config(**settings)
