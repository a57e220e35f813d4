"""Places what asks for a CUDA device on the CPU, in every thread, and names tensor types as CUDA would."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from hp_plugin.cpu_backend.hook import MEGATRON, TORCH, Hook

FACTORIES = (
    *("tensor", "as_tensor", "asarray", "scalar_tensor", "empty", "empty_strided", "zeros", "ones", "full"),
    *("arange", "linspace", "logspace", "eye", "rand", "randn", "randint", "randperm"),
    *("tril_indices", "triu_indices", "empty_like", "zeros_like", "ones_like", "full_like"),
    *("rand_like", "randn_like", "randint_like"),
)
TENSOR_FACTORIES = ("new_tensor", "new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full")
_YARN = "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding"
_NEVER = "PyTorch has one device name for whatever the machine has"


def on_cpu(device: Any) -> Any:
    """The CPU where `device` names a CUDA device (a string, a number or a `torch.device`), else `device` itself."""
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    names_cuda = isinstance(device, str) and device.split(":")[0] == "cuda"
    is_number = isinstance(device, int) and not isinstance(device, bool)
    return torch.device("cpu") if names_cuda or is_number else device


def place(original: Callable[..., Any]) -> Callable[..., Any]:
    """A factory of tensors that makes on the CPU what it is told to make on CUDA; pinned memory is plain memory."""

    @wraps(original)
    def placed(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return placed


def move(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.to`, where the device may also be the first argument."""

    @wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        return original(self, *(on_cpu(arg) for arg in args[:1]), *args[1:], **kwargs)

    return to


def stay(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.cuda` and `Tensor.pin_memory` of a tensor that is there already: the tensor itself."""

    @wraps(original)
    def stayed(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    return stayed


def place_generator(original: type[torch.Generator]) -> type:
    """`torch.Generator`, made on the CPU where it is told to be made on CUDA; what is one stays one."""

    class OnCPU(type):
        def __call__(cls, device: Any = "cpu") -> torch.Generator:
            return original(device=on_cpu(device))

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, original)

    return OnCPU("Generator", (), {"__doc__": original.__doc__})


def name_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type`, which says `torch.cuda.FloatTensor` of a CPU tensor and takes such names for CPU types."""

    @wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and self.device.type == "cpu":
            return original(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return original(self, dtype, *args, **kwargs)

    return type_


def on_host(original: Callable[..., None]) -> Callable[..., None]:
    """`YarnRotaryEmbedding.__init__`, which enters a device by its number, with initialization on the CPU."""

    @wraps(original)
    def init(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs | {"use_cpu_initialization": True})

    return init


def ignore(original: Callable[..., Any]) -> Callable[..., None]:
    """A call that only orders work on CUDA streams or devices, of which there are none."""

    @wraps(original)
    def ignored(*args: Any, **kwargs: Any) -> None:
        return None

    return ignored


HOOKS = [
    *(Hook("torch", name, place, _NEVER, TORCH) for name in FACTORIES),
    *(Hook("torch.Tensor", name, place, _NEVER, TORCH) for name in TENSOR_FACTORIES),
    Hook("torch", "Generator", place_generator, _NEVER, TORCH),
    Hook("torch.Tensor", "to", move, _NEVER, TORCH),
    Hook("torch.Tensor", "cuda", stay, _NEVER, TORCH),
    Hook("torch.Tensor", "pin_memory", stay, "it is a no-op where there is no device to copy to", TORCH),
    Hook("torch.Tensor", "record_stream", ignore, "it is a no-op on the CPU", TORCH),
    Hook(
        f"{_YARN}.YarnRotaryEmbedding",
        "__init__",
        on_host,
        until="it makes its frequencies on the CPU where there is no GPU",
        made_for=MEGATRON,
        fragment=(f"{_YARN}.YarnRotaryEmbedding.__init__", "with torch.device(device):"),
    ),
    Hook(
        "torch.Tensor",
        "type",
        name_type,
        until="megatron.core.optimizer tells precisions apart by dtype, not by Tensor.type()",
        made_for=MEGATRON,
        fragment=("megatron.core.optimizer.distrib_optimizer", "model_param.type() == 'torch.cuda.FloatTensor'"),
    ),
]
