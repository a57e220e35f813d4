"""A pytest plugin that puts the grid into Megatron-LM's own tests, on CPU ranks, and compares weight gradients, too.

Used by tools/upstream_tests.sh. The tests are as upstream has them; what they name and this machine lacks is replaced:
NCCL by gloo, Transformer Engine's layer specs by the local ones. What made them take hours on two cores is taken out:
groups that no layout needs any more, and a server for every rank that saves.
"""

from __future__ import annotations

import gc
import os
import sys
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hp_plugin.refusal import shorten
from hp_plugin.upstream.write_results import write_without_server

SLICES, FAILURES, RANK = int(os.environ["SLICES"]), os.environ["FAILURES"], os.environ.get("RANK", "0")
TOLERANCE = 2e-2  # of bf16 gradients, against their largest; the tests' own is 1e-2 for each element of the output
_STATE: dict[str, Any] = {"grid": None, "grids": {}, "models": []}
_REPORTS: list[tuple[str, str, str]] = []


def _replace_what_is_missing() -> None:
    # It downloads data that these tests do not read.
    download = types.ModuleType("tests.test_utils.python_scripts.download_unit_tests_dataset")
    download.download_and_extract_asset = lambda **_: None  # type: ignore[attr-defined]
    sys.modules[download.__name__] = download
    joined = dist.init_process_group
    dist.init_process_group = lambda *args, **given: joined(*args, **{**given, "backend": "gloo"})  # type: ignore[assignment]

    from hp_plugin.cpu_backend import megatron_lm

    megatron_lm.enable()
    write_without_server()
    torch.cuda.device_count = lambda: 1
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    init_data = ShardedTensor.init_data
    # What a rank gets from others is made on the GPU by name; without one it would fail alone, and they would wait.
    ShardedTensor.init_data = lambda tensor, device, *args, **given: init_data(tensor, "cpu", *args, **given)
    from megatron.core.models.gpt import gpt_layer_specs as specs

    def local_spec(*_: Any, qk_layernorm: bool = False, **__: Any) -> Any:
        return specs.get_gpt_layer_local_spec(qk_layernorm=qk_layernorm)

    specs.get_gpt_layer_with_transformer_engine_spec = local_spec
    specs.get_gpt_layer_with_transformer_engine_submodules = lambda *args, **given: (
        local_spec(*args, **given).submodules
    )


def _end_groups_with_their_layout() -> None:
    """Megatron-Core forgets them; gloo's threads go on looking for work, a hundred times a second for each group."""
    from megatron.core import parallel_state

    forget = parallel_state.destroy_model_parallel

    def destroy_model_parallel() -> None:
        forget()
        for group in list(dist.distributed_c10d._world.pg_map):
            if group != dist.group.WORLD:
                dist.destroy_process_group(group)
        gc.collect()  # models hold theirs

    parallel_state.destroy_model_parallel = destroy_model_parallel


def _put_the_grid_in() -> None:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from hp_plugin.config import HeadDimConfig
    from hp_plugin.megatron_lm.model_hooks import ModelHooks

    hooks = ModelHooks(lambda: _STATE["grid"])
    hooks.check()
    hooks.install()
    initialize, build = parallel_state.initialize_model_parallel, GPTModel.__init__

    def initialize_model_parallel(tensor_model_parallel_size: int = 1, *args: Any, **given: Any) -> None:
        size, n = tensor_model_parallel_size, min(SLICES, tensor_model_parallel_size)
        _STATE["grid"] = HeadDimConfig(size // n, n) if size > 1 else None
        if size > 1:
            _STATE["grids"][_STATE["grid"].flag] = None
        initialize(size, *args, **{"distributed_timeout_minutes": 2, **given})

    def __init__(model: Any, config: Any, *args: Any, **given: Any) -> None:
        grid = _STATE["grid"]
        # Tests also change the TP size of a configuration that is there already.
        if grid is not None and config.tensor_model_parallel_size == grid.size:
            config.head_dim_parallel = grid
        build(model, config, *args, **given)

    parallel_state.initialize_model_parallel = initialize_model_parallel
    GPTModel.__init__ = __init__


_replace_what_is_missing()
_end_groups_with_their_layout()
_put_the_grid_in()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what cannot run here whatever is put in: fused kernels and, for local layers, context parallelism."""
    for item in items:
        given = getattr(item, "callspec", None)
        given = {} if given is None else given.params
        if given.get("apply_rope_fusion") or given.get("cp", 1) > 1:
            item.add_marker(pytest.mark.skip(reason="needs Transformer Engine on a GPU"))
        module = item.module  # type: ignore[attr-defined]
        if hasattr(module, "_test_parallel_attention_correctness") and not hasattr(module, "_compares_weights"):
            module._compares_weights = True
            _compare_weights_too(module)


def _compare_weights_too(module: Any) -> None:
    unwrap, test = module.unwrap_model, module._test_parallel_attention_correctness

    def remembering(model: Any) -> Any:
        _STATE["models"].append(unwrap(model))
        return _STATE["models"][-1]

    def with_weights(*args: Any, **given: Any) -> None:
        _STATE["models"].clear()
        test(*args, **given)
        if _STATE["grids"]:
            baseline, parallel = (model[0].decoder.layers[0].self_attention for model in _STATE["models"][:2])
            _STATE["gradients"] = _weight_gradients(baseline, parallel, given.get("sp", False))

    module.unwrap_model, module._test_parallel_attention_correctness = remembering, with_weights


def _weight_gradients(baseline: Any, parallel: Any, sequence_parallel: bool) -> str:
    """Compares the gradient of every weight with this rank's piece of stock's at TP = 1; the worst in words."""
    from hp_plugin.grid.ownership import proj_columns, qkv_rows

    config, grid = parallel.true_config, parallel.head_dim
    h, g, d, i_j = config.num_attention_heads, config.num_query_groups, config.kv_channels, parallel.groups.coordinates
    rows = qkv_rows(h, g, d, grid.m, grid.n, config.attention_output_gate).owned(*i_j)
    columns = proj_columns(h, d, grid.m, grid.n).owned(*i_j)
    whole = dict(baseline.named_parameters())
    worst, where, compared = 0.0, "", 0
    for name, parameter in parallel.named_parameters():
        own, stock = (_gradient(one) for one in (parameter, whole[name]))
        if "linear_qkv" in name:
            stock = stock[rows]
        elif name == "linear_proj.weight":
            stock = stock[:, columns]
        elif "layernorm" in name or sequence_parallel:
            # Megatron's finalization sums over the TP group, here the world, what ranks hold parts of.
            dist.all_reduce(own)
        if not stock.any() and name == "linear_proj.bias":  # returned beside the output, and not in the tests' loss
            assert not own.any()
            continue
        assert stock.any(), f"no gradient of {name}"
        difference = float((own - stock).abs().max() / stock.abs().max())
        compared += 1
        if not difference <= worst:
            worst, where = difference, name
    assert worst <= TOLERANCE, f"gradient of {where} differs by {worst:.1e} of its largest element"
    return f"{compared} within {worst:.1e} of their largest"


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    # In DDP's buffer as long as somebody holds the DDP, which these tests do not.
    found = [grad for grad in (parameter.grad, getattr(parameter, "main_grad", None)) if grad is not None]
    assert found
    return sum(grad.detach().float() for grad in found).clone()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Notes a line of the table."""
    outcome = yield
    report = outcome.get_result()
    if call.when == "setup":
        _STATE["grids"], _STATE["gradients"] = {}, "none compared"
    if report.failed:
        with open(FAILURES, "a") as together:
            said = shorten(call.excinfo.exconly() if call.excinfo else "", 300)
            together.write(f"rank {RANK}, {call.when} of {item.name}: {said}\n")
    if call.when == "call":
        grids = ", ".join(_STATE["grids"]) or "none"
        words = {"passed": "as stock", "failed": "FAILED", "skipped": "skipped"}[report.outcome]
        _REPORTS.append((item.name, grids, f"{words}; {_STATE['gradients']}" if report.passed else words))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Failures are in the file: torchrun would end the other ranks before they have said theirs."""
    session.exitstatus = 0


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the table."""
    terminalreporter.write_line("\n| test | grids | result; gradients of weights |\n|---|---|---|")
    for line in _REPORTS:
        terminalreporter.write_line(f"| {' | '.join(line)} |")
