"""Lets the distributed optimizer be saved and resumed with torch's Adam, which counts steps per parameter.

Megatron-Core resumes it with Transformer Engine's or Apex's Adam, neither of which runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from hp_plugin.cpu_backend.hook import MEGATRON, Hook


def begin_with_a_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """`DistributedOptimizer.state_dict`, which asks for the step that all parameters have in common: before the first
    one, where there is no state yet, it is 0."""

    @wraps(original)
    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = self.optimizer
        if not inner.state:
            self.init_state_fn(inner, self.config)
            for state in inner.state.values():
                state.setdefault("step", torch.zeros((), dtype=torch.float32))
        return original(self, *args, **kwargs)

    return state_dict


def count_separately(original: Callable[..., Any]) -> Callable[..., None]:
    """`DistributedOptimizer.load_state_dict`, which gives all parameters one and the same tensor for their step:
    torch's Adam would count it up once for each of them."""

    @wraps(original)
    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    return load_state_dict


def keep_own_step(original: Callable[..., Any]) -> Callable[..., None]:
    """`DistributedOptimizer._set_main_param_and_optimizer_states`, which looks for a step among a parameter's loaded
    tensors; it came with the parameter groups."""

    @wraps(original)
    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        own = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        original(self, model_param, {"step": own["step"], **tensors} if "step" in own else tensors)

    return set_states


_OWNER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"

HOOKS = [
    Hook(
        _OWNER,
        "state_dict",
        begin_with_a_state,
        until="DistributedOptimizer.state_dict answers before the first step of torch's Adam",
        made_for=MEGATRON,
        parameters=("self",),
        fragment=(f"{_OWNER}.state_dict", 'steps = list(set([s["step"].item() for s in inner_state_dict["state"]'),
    ),
    Hook(
        _OWNER,
        "load_state_dict",
        count_separately,
        until="DistributedOptimizer.load_state_dict gives every parameter a step of its own",
        made_for=MEGATRON,
        parameters=("self", "state_dict"),
        fragment=(f"{_OWNER}.load_state_dict", 's["step"] = step'),
    ),
    Hook(
        _OWNER,
        "_set_main_param_and_optimizer_states",
        keep_own_step,
        until="DistributedOptimizer leaves the step of torch's Adam alone when it loads a parameter's tensors",
        made_for=MEGATRON,
        parameters=("self", "model_param", "tensors"),
        fragment=(f"{_OWNER}._set_main_param_and_optimizer_states", "dst_tensors[key].copy_(tensors[key])"),
    ),
]
