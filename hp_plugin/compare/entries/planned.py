"""A compared layout as the planner sees it."""

from __future__ import annotations

from dataclasses import replace

from hp_plugin.compare.entries.decoding import sequences_of_rank
from hp_plugin.compare.entries.entrant import Entrant
from hp_plugin.compare.entries.suites import DECODE, context_of
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.transformer import build_transformer_config


def model_shape(config: TrainingConfig) -> ModelShape:
    """The trainer's model in the planner's letters."""
    transformer = build_transformer_config(config)
    width = config.kv_channels or config.hidden_size // config.num_attention_heads
    positions = config.position_embedding_type
    return ModelShape(
        "compared",
        layers=config.num_layers,
        D=config.hidden_size,
        h=config.num_attention_heads,
        g=config.query_groups,
        d=width,
        ffn=transformer.moe_ffn_hidden_size if config.num_experts else transformer.ffn_hidden_size,
        vocab=config.padded_vocab_size,
        gated=config.swiglu,
        tied=not config.untie_embeddings_and_output_weights,
        biases=not config.disable_bias_linear,
        norm_biases=config.normalization == "LayerNorm",
        learned_positions=config.seq_length if positions == "learned_absolute" else 0,
        rotary=positions == "rope",
        experts=config.num_experts or 0,
        top_k=config.moe_router_topk,
        moe_every=config.moe_layer_freq,
        qkv_bias=config.add_qkv_bias,
        qk_norm=config.qk_layernorm,
    )


def share_of(entrant: Entrant, mode: str) -> Share:
    """One rank's share of the step that is timed."""
    config = entrant.config
    assert config.global_batch_size is not None
    itemsize = 2 if config.fp16 or config.bf16 else 4
    context = context_of(mode)
    if context is not None:
        workload = Workload(DECODE, context + 1, config.global_batch_size, itemsize)
        at_once = replace(entrant.layout, micro_batch=sequences_of_rank(config, entrant.layout.world))
        return Share(model_shape(config), at_once, workload)
    workload = Workload(mode, config.seq_length, config.global_batch_size, itemsize, 2 if config.fp16 else 4)
    share = Share(model_shape(config), entrant.layout, workload)
    grid = entrant.layout.grid
    if grid is None or not grid.chooses:
        return share
    own = config.transformer_impl == "local"
    chosen = replace(entrant.layout, grid=grid.with_exchange(share.chosen(own)))
    return replace(share, layout=chosen, left_open=own and grid.moves_weights)


def group_sizes(entrant: Entrant) -> dict[str, int]:
    """Ranks of a group, by axis."""
    layout = entrant.layout
    # Activations go from stage to stage, and tied embeddings' gradients between the first and the last: always two.
    return {
        "tp": layout.tp,
        "head": layout.m,
        "dim": layout.n,
        "pp": 2,
        "ends": 2,
        "cp": layout.cp,
        "ep": layout.ep,
        "dp": layout.replicas,
        "edp": layout.expert_replicas,
        "world": layout.world,
    }
