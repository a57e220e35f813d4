"""Gloo's collectives for tensors on a GPU, by way of host memory: the one place where that is done.

Gloo has some of them for CUDA tensors and some not, which differs between releases of torch, and its messages between
two ranks read device memory as if it were the host's. So all of them are staged: what gloo is given is on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_READ, _WRITTEN, _BOTH = "read", "written", "both"
_IN_PLACE, _OUT_OF_PLACE = (_BOTH,), (_WRITTEN, _READ)
METHODS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("broadcast", "allreduce", "allreduce_coalesced", "reduce"), _IN_PLACE),
    **dict.fromkeys(
        ("allgather", "allgather_coalesced", "gather", "scatter", "reduce_scatter", "alltoall"), _OUT_OF_PLACE
    ),
    **dict.fromkeys(("_allgather_base", "_reduce_scatter_base", "alltoall_base"), _OUT_OF_PLACE),
    **dict.fromkeys(("all_gather_single", "reduce_scatter_single", "all_to_all_single"), _OUT_OF_PLACE),
    **dict.fromkeys(("allgather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced"), _OUT_OF_PLACE),
    **dict.fromkeys(("all_gather_single_coalesced", "reduce_scatter_single_coalesced"), _OUT_OF_PLACE),
    "send": (_READ,),
    "recv": (_WRITTEN,),
    "recv_anysource": (_WRITTEN,),
}
"""`torch.distributed.ProcessGroup`'s methods that take tensors, and what becomes of their first arguments (torch 2.13
has other names for some; releases have those that they have)."""
_GATHERS = ("_allgather_base", "all_gather_single")


class Staging:
    """Stages every collective of this process whose tensors are on a device.

    Args:
        staged: which tensors are to be staged; those on CUDA.
    """

    def __init__(self, staged: Callable[[Tensor], bool] = lambda tensor: tensor.is_cuda) -> None:
        self._staged = staged
        self._originals: dict[str, Any] = {}

    def install(self) -> None:
        """Replaces the methods; twice is once."""
        if self._originals:
            return
        # The descriptors, for putting them back: pybind's plain functions would no longer get their `self`.
        self._originals = {name: vars(dist.ProcessGroup)[name] for name in METHODS if name in vars(dist.ProcessGroup)}
        for name in self._originals:
            setattr(dist.ProcessGroup, name, self._method(name))

    def remove(self) -> None:
        """Puts them back."""
        for name, original in self._originals.items():
            setattr(dist.ProcessGroup, name, original)
        self._originals = {}

    def _method(self, name: str) -> Callable[..., Any]:
        original, roles = getattr(dist.ProcessGroup, name), METHODS[name]

        @wraps(original)
        def call(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            back: list[tuple[Tensor, Tensor]] = []
            given = [self._on_host(argument, role, back) for argument, role in zip(arguments, roles, strict=False)]
            if name in _GATHERS and given[0].dim() == 1 and given[0] is not arguments[0]:
                given[1] = given[1].view(-1)  # NCCL compares numbers of elements, gloo shapes
            work = original(group, *given, *arguments[len(roles) :], **options)
            return StagedWork(work, given, back) if _tensors_differ(given, arguments) else work

        return call

    def _on_host(self, value: Any, role: str, back: list[tuple[Tensor, Tensor]]) -> Any:
        """A copy of nested lists of tensors, those to be staged on the host; `back` gets (tensor, its place there)."""
        if isinstance(value, (list, tuple)):
            return [self._on_host(part, role, back) for part in value]
        if not isinstance(value, Tensor) or not self._staged(value):
            return value
        host = torch.empty(value.shape, dtype=value.dtype, device="cpu")
        if role != _WRITTEN:
            host.copy_(value.detach())  # waits for the stream that makes the values
        if role != _READ:
            back.append((value, host))
        return host


class StagedWork:
    """A handle as torch's own: what a collective has written is on the device once it has been waited for."""

    def __init__(self, work: Any, held: Any, back: list[tuple[Tensor, Tensor]]) -> None:
        self._work, self._held, self._back = work, held, back

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Returns when the results are under way to the device, on its current stream."""
        if self._work is not None:
            self._work.wait() if timeout is None else self._work.wait(timeout)
        for tensor, host in self._back:
            tensor.detach().copy_(host)
        self._back, self._held = [], None
        return True

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether it is; the results are on their way then."""
        return (self._work is None or bool(self._work.is_completed())) and self.wait()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"collectives that are staged through host memory have no {name}: wait for them")


def _tensors_differ(given: Any, arguments: Any) -> bool:
    """Whether anything in nested lists has been replaced."""
    if isinstance(given, (list, tuple)):
        return any(_tensors_differ(one, other) for one, other in zip(given, arguments, strict=False))
    return given is not arguments
