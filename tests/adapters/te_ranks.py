"""One of four ranks beside a stub of Transformer Engine: trains stock and grids through its layer spec, and breaks it.

torchrun --nproc-per-node 4 tests/adapters/te_ranks.py RESULT.json [NAME of an equal case ...]

with tests/te_stub first on PYTHONPATH.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

warnings.simplefilter("ignore")

from megatron.core.extensions import transformer_engine as extension  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from transformer_engine import released  # noqa: E402
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager  # noqa: E402

from hp_plugin import cpu_backend  # noqa: E402
from hp_plugin.attention import core_attention, fused_core  # noqa: E402
from hp_plugin.attention.specs import head_dim_spec  # noqa: E402
from hp_plugin.config import HeadDimConfig  # noqa: E402
from hp_plugin.exchange.fused_kernels import fused_attention  # noqa: E402
from tests.dist import gpt  # noqa: E402
from tests.dist.gpt import Case  # noqa: E402
from tests.dist.gpt_parts import assemble  # noqa: E402
from tests.ranks import _tear_down_megatron, destroy_groups_but  # noqa: E402

FP8 = {"fp8": "hybrid", "kv_channels": 16}
ROPE = {"apply_rope_fusion": True}
NORMS = {"qk_layernorm": True, "normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False}
SP = {"sequence_parallel": True}
WIDE = {"kv_channels": 260, "attention_backend": AttnBackend.fused}

# name: (grid, fields of TransformerConfig on both sides, fields of the grid's alone)
EQUAL: dict[str, tuple[HeadDimConfig, dict[str, Any], dict[str, Any]]] = {
    **{name: (HeadDimConfig(2, 2, name), {}, {}) for name in ("batch", "sequence", "scores")},
    **{f"{name}, fused rotary": (HeadDimConfig(2, 2, name), ROPE, {}) for name in ("batch", "sequence", "scores")},
    **{f"{name}, norms": (HeadDimConfig(1, 4, name), NORMS, SP) for name in ("sequence", "scores")},
    "batch, norms": (HeadDimConfig(2, 2, "batch"), NORMS, SP),
    "batch, biases in QKV": (HeadDimConfig(2, 2, "batch"), {"add_bias_linear": False, "add_qkv_bias": True}, {}),
    "4x1": (HeadDimConfig(4, 1), {"num_query_groups": 4}, SP),
    "batch, full recompute": (
        HeadDimConfig(2, 2, "batch"),
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {},
    ),
    "batch, window": (HeadDimConfig(2, 2, "batch"), {"window_size": (5, 0)}, {}),
    "batch, FP8": (HeadDimConfig(2, 2, "batch"), FP8, SP),
    "scores, FP8": (HeadDimConfig(2, 2, "scores"), FP8, {}),
    "batch, d = 260, fused": (HeadDimConfig(2, 2, "batch"), WIDE, {}),
}
REFUSED: dict[str, tuple[HeadDimConfig, dict[str, Any]]] = {
    "weights": (HeadDimConfig(2, 2, "weights"), {}),
    "weights, FP8": (HeadDimConfig(2, 2, "weights"), FP8),
    "FP8, narrow slices": (HeadDimConfig(2, 2, "batch"), {**FP8, "kv_channels": 8}),
    "MXFP8, narrow slices": (HeadDimConfig(2, 2, "batch"), {**FP8, "fp8_recipe": "mxfp8"}),
    "FP8 parameters": (HeadDimConfig(2, 2, "batch"), {**FP8, "fp8_param": True}),
    "userbuffers": (HeadDimConfig(2, 2, "batch"), {**SP, "tp_comm_overlap": True}),
}


def layer_spec(config: Any, case: Case, vp_stage: int | None) -> Any:
    """Transformer Engine's layers, on both sides; stock's with the fused core, as the reference trainer has it."""
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    if case.grid is None:
        return fused_core.with_fused_core(spec, config)
    return head_dim_spec(spec, config, vp_stage)


def trained(case: Case) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and first gradients, whole, on every rank."""
    outcome = gpt.train(case)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, outcome.grads)
    return outcome.losses, assemble(everyone, case.grid.size if case.grid is not None else case.tp)


def ended(body: Callable[[], Any]) -> Any:
    """What a body returns, or raises; its groups and globals are gone afterwards."""
    try:
        return body()
    except Exception as error:
        return {"raised": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
    finally:
        # A body fails on all ranks, but not at once: a group is not to end under those that still join it.
        dist.barrier()
        FP8GlobalStateManager.reset()
        _tear_down_megatron()
        destroy_groups_but(dist.group.WORLD)


def difference(grid: HeadDimConfig, both: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """Largest difference of losses, and of gradients relative to the largest of each tensor."""
    case = Case(layers=1, steps=1, model=both)
    expected = ended(lambda: trained(case))
    if isinstance(expected, dict):
        return expected
    # Four data-parallel ranks have a micro-batch of two each, one model-parallel group has four of them.
    reduced: list[Any] = []
    calls = mock.Mock(side_effect=fused_attention)

    def on_grid() -> Any:
        result = trained(replace(case, tp=grid.size, grid=grid, model={**both, **alone}))
        reduced.extend(FP8GlobalStateManager.modules)
        return result

    with mock.patch.object(fused_core, "fused_attention", calls):
        found = ended(on_grid)
    if isinstance(found, dict):
        return found
    theirs, mine = expected[1], found[1]
    assert theirs.keys() == mine.keys(), (sorted(theirs), sorted(mine))
    worst = {
        name: float((tensor - mine[name]).abs().max()) / max(float(tensor.abs().max()), 1e-3)
        for name, tensor in theirs.items()
    }
    name = max(worst, key=lambda one: worst[one])
    return {
        "losses": max(abs(one - other) for one, other in zip(expected[0], found[0], strict=True)),
        "gradients": [name, worst[name]],
        "fp8 modules": sorted({name for name, _ in reduced}),
        "fp8 group": sorted({dist.get_world_size(group) for _, group in reduced}),
        "fused calls": calls.call_count,
    }


# --- broken on purpose ------------------------------------------------------------------------------------------------


def attends_on(change: Callable[[Any, dict[str, Any]], None]) -> Any:
    """The core attention's constructor, with its arguments changed."""
    original = core_attention.HeadDimCoreAttention.__init__

    def changed(self: Any, *args: Any, **kwargs: Any) -> None:
        change(self, kwargs)
        original(self, *args, **kwargs)

    return mock.patch.object(core_attention.HeadDimCoreAttention, "__init__", changed)


def whole_group(self: Any, arguments: dict[str, Any]) -> None:
    """The TP group of all P ranks, where heads are divided over the head group."""
    arguments["pg_collection"].tp = arguments["turn"].exchange.groups.tp


def heads_of_all(self: Any, arguments: dict[str, Any]) -> None:
    """The key/value heads that the configuration pretends to while stock checks it, n times as many."""
    config = arguments["config"] = replace_fields(arguments["config"], num_query_groups=4)
    assert config.num_query_groups == 4


def replace_fields(config: Any, **fields: Any) -> Any:
    import copy

    config = copy.copy(config)
    vars(config).update(fields)
    return config


def without_parameter(name: str, parameter: str) -> Any:
    """A release whose constructor has lost a parameter."""
    signature = released.SIGNATURES[name]
    kept = [one for one in signature.parameters.values() if one.name != parameter]
    return mock.patch.dict(released.SIGNATURES, {name: signature.replace(parameters=kept)})


BROKEN: dict[str, Callable[[], Any]] = {
    "wrong group": lambda: attends_on(whole_group),
    "wrong head count": lambda: attends_on(heads_of_all),
    "changed signature": lambda: without_parameter("LayerNormLinear.__init__", "zero_centered_gamma"),
}


def main(path: str, names: list[str]) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    cpu_backend.enable()
    gpt.layer_spec = layer_spec
    results: dict[str, Any] = {"version": str(extension.get_te_version()), "have": extension.HAVE_TE}
    for name in names or EQUAL:
        results[f"equal: {name}"] = difference(*EQUAL[name])
    for name, (grid, fields) in REFUSED.items():
        case = Case(tp=grid.size, grid=grid, layers=1, model=fields)
        found = ended(lambda case=case: bool(trained(case)))
        results[f"refused: {name}"] = found
    case = Case(tp=4, grid=HeadDimConfig(2, 2, "batch"), layers=1, steps=1)
    for name, breaking in BROKEN.items():
        with breaking():
            results[f"broken: {name}"] = ended(lambda: bool(trained(case)))
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(results, indent=1), "utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
