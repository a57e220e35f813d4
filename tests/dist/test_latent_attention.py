"""Multi-latent attention under `weights` trains as stock's on one rank: losses, norms, gradients, parameters."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from hp_plugin.attention.specs import head_dim_spec
from hp_plugin.attention.transformer_config import HeadDimMLATransformerConfig
from hp_plugin.config import HeadDimConfig
from hp_plugin.refusal import RefusedError
from tests.adapters.checkpoint_cases import quick_results_queue
from tests.dist import gpt
from tests.dist.gpt import Case, Outcome
from tests.dist.gpt_parts import Part, assemble, collect
from tests.dist.test_gpt_on_grid import agrees, stock_case
from tests.ranks import Ranks, prepare_device

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
    "normalization": "LayerNorm",
}


class PlainCore(torch.nn.Module):
    """Attention by its definition: stock's own is given widths that it does not take."""

    def __init__(self, config: Any, softmax_scale: float, **of_stock: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **of_stock: Any) -> Tensor:
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) * self.scale
        weights = scores.masked_fill(attention_mask, -10000.0).softmax(dim=-1)
        return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


def layer_spec(config: Any, case: Case, vp_stage: int | None) -> Any:
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(config, False, vp_stage=vp_stage)
        layers = spec.layer_specs
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, multi_latent_attention=True, normalization=config.normalization
        )
        layers = [spec]
    for layer in layers:
        attention = layer.submodules.self_attention.submodules
        if case.grid is None:
            attention.core_attention = PlainCore
    return spec if case.grid is None else head_dim_spec(spec, config, vp_stage)


@contextmanager
def latent(case: Case) -> Iterator[None]:
    """`tests.dist.gpt` makes models with multi-latent attention."""
    of_six = {"VOCABULARY": 66, "SEQUENCE": 18} if case.model["hidden_size"] % 6 == 0 else {}
    ours = {
        "layer_spec": layer_spec,
        "TransformerConfig": MLATransformerConfig,
        "HeadDimTransformerConfig": HeadDimMLATransformerConfig,
        **of_six,
    }
    kept = {name: getattr(gpt, name) for name in ours}
    vars(gpt).update(ours)
    try:
        yield
    finally:
        vars(gpt).update(kept)


def train(case: Case) -> Outcome:
    with latent(case):
        return gpt.train(case)


def on(m: int, n: int, micro_batch: int = 4, exchange: str = "weights", **fields: Any) -> Case:
    model = {**LATENT, "hidden_size": 32, **fields.pop("model", {})}
    return Case(grid=HeadDimConfig(m, n, exchange), tp=m * n, micro_batch=micro_batch, model=model, **fields)


SP = {"sequence_parallel": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FOUR = {"num_attention_heads": 4, "num_query_groups": 4}
ODD = {
    **{"hidden_size": 36, "ffn_hidden_size": 54, "q_lora_rank": 30, "kv_lora_rank": 18, "qk_pos_emb_head_dim": 6},
    **{"v_head_dim": 15},
}
# With norms newer releases need Transformer Engine for it.
NO_QUERY_LATENTS = {"q_lora_rank": None, "qk_layernorm": False}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 8, "rotary_scaling_factor": 4.0, "mscale_all_dim": 1.0}
# A dense layer and mixtures with an expert that all tokens share, as in DeepSeek's models.
MIXED = {
    **{"num_moe_experts": 4, "moe_layer_freq": [0, 1, 1, 1], "moe_ffn_hidden_size": 16, "moe_router_topk": 2},
    **{"moe_shared_expert_intermediate_size": 16, "moe_router_load_balancing_type": "none"},
    **{"moe_router_score_function": "sigmoid", "normalization": "RMSNorm"},
}
CASES = {
    "2x2": on(2, 2),
    "1x4, three heads": on(
        1, 4, model={"num_attention_heads": 3, "num_query_groups": 3, "kv_channels": 16, "v_head_dim": 12}
    ),
    "4x1": on(4, 1, model=FOUR),
    "4x1 SP": on(4, 1, exchange="auto", model=FOUR | SP),
    "2x3 by tokens, SP": on(2, 3, model=ODD | SP),
    "2x2 auto, masks of their own": on(2, 2, exchange="auto", own_masks=True),
    "2x2 SP, yarn": on(2, 2, model=SP | YARN),
    "2x2 by tokens, yarn": on(2, 2, 1, model=YARN),
    "1x4 by tokens, SP": on(1, 4, 2, model=SP),
    "2x2 by tokens, SP, recompute layers, queries without latents": on(2, 2, 1, model=SP | FULL | NO_QUERY_LATENTS),
    "2x2 auto by tokens, queries without latents": on(2, 2, 1, "auto", model=NO_QUERY_LATENTS),
    "2x2 recompute up-projections": on(
        2, 2, 2, model={"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]}
    ),
    "2x2 recompute attention by tokens": on(2, 2, 1, model={"recompute_granularity": "selective"}),
    "2x2 by tokens, ends as stock's, untied": on(2, 2, 1, ends=False, tied=False),
    "1x2 PP=2 interleaved": on(1, 2, 2, pp=2, vp=2),
    "2x1 PP=2": on(2, 1, 2, pp=2),
    "1x2 distributed optimizer DP=2": on(1, 2, 2, distributed_optimizer=True, overlap=True, clip_grad=0.5),
    "2x1 DP=2": on(2, 1, 2),
    "2x2 mixtures SP": on(2, 2, 2, model=MIXED | SP),
    "2x2 auto, mixtures SP by tokens": on(2, 2, 1, "auto", model=MIXED | SP),
}
STOCK: dict[str, Outcome] = {}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_trains_as_stock_on_one_rank(ranks: Ranks, case: Case) -> None:
    alone = stock_case(case)
    if repr(alone) not in STOCK:
        (STOCK[repr(alone)],) = ranks.run(1, train, alone)
    agrees(case, STOCK[repr(alone)], ranks.run(max(4, case.tp * case.pp), train, case))


def saved(case: Case, folder: str) -> dict[str, Part]:
    """Saves a new model of this layout; what it holds."""
    with files(), latent(case):
        (chunk,) = made(case)
        dist_checkpointing.save(chunk.module.sharded_state_dict(), folder)
        return collect([chunk], lambda parameter: parameter.data)


def loaded(case: Case, folder: str) -> dict[str, Part]:
    """What a model of this layout, of other weights, holds once it has loaded."""
    with files(), latent(case):
        (chunk,) = made(case)
        for parameter in chunk.parameters():
            parameter.data.fill_(7.0)
        chunk.module.load_state_dict(dist_checkpointing.load(chunk.module.sharded_state_dict(), folder))
        return collect([chunk], lambda parameter: parameter.data)


def made(case: Case) -> list[Any]:
    prepare_device()
    gpt.start(case)
    return gpt.build(case)


@contextmanager
def files() -> Iterator[None]:
    # Megatron-Core writes files from processes of its own, which multiprocessing denies to the harness' daemons.
    multiprocessing.current_process()._config["daemon"] = False
    filesystem_async._results_queue = quick_results_queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = None


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("case", [on(2, 2), on(1, 4, 1, "auto")], ids=["2x2", "1x4 auto"])
def test_a_checkpoint_goes_to_stock_and_back(ranks: Ranks, tmp_path: Path, case: Case) -> None:
    alone = stock_case(case)
    for name, (first, there), (second, here) in (
        ("to stock", (4, case), (1, alone)),
        ("from stock", (1, alone), (4, case)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        before = assemble(ranks.run(first, saved, there, str(folder)), there.tp)
        after = assemble(ranks.run(second, loaded, here, str(folder)), here.tp)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def config(exchange: str, order: str = "dim-innermost", m: int = 2, n: int = 2, **fields: Any) -> Any:
    sizes = {"num_layers": 2, "hidden_size": 32, "head_dim_parallel": HeadDimConfig(m, n, exchange, order)}
    return HeadDimMLATransformerConfig(**{**LATENT, **sizes, **fields})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"exchange": "batch"},
            "`batch` could trade: use --head-dim-exchange weights, or --tensor-model-parallel-size",
        ),
        ({"exchange": "scores"}, "`scores` could trade: use --head-dim-exchange weights"),
        ({"exchange": "auto", "order": "head-innermost"}, "give --head-dim-order dim-innermost"),
        ({"exchange": "weights", "kv_lora_rank": 18}, "22 channels of latents of keys and values"),
        ({"exchange": "weights", "v_head_dim": 9}, "18 channels of heads of outputs"),
        ({"exchange": "weights", "kv_channels": 9}, "18 channels of heads of kv_channels"),
        ({"exchange": "weights", "m": 4, "n": 1}, "m=4 must divide both"),
        ({"exchange": "weights", "micro_batch_size": 1, "seq_length": 18}, "needs a micro-batch size divisible by n"),
        ({"exchange": "auto", "micro_batch_size": 1, "seq_length": 18}, "needs a micro-batch size divisible by n"),
        ({"exchange": "auto", "context_parallel_size": 2}, "cannot do context parallelism"),
        ({"exchange": "weights", "m": 2, "n": 1, "softmax_type": "off-by-one"}, "cannot do a softmax offset"),
        ({"exchange": "weights", "cache_mla_latents": True}, "latents in a cache"),
    ],
    ids=str,
)
def test_what_latent_attention_cannot_do_is_refused_in_words(settings: dict[str, Any], said: str) -> None:
    with pytest.raises((RefusedError, ValueError), match=said):
        config(**settings)
