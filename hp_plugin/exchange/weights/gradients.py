"""Gradients of gathered weights: each is reduced and scattered while backward goes on, and arrives one weight later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hp_plugin.exchange.weights.shards import Shard, start_reducing


class Reducer:
    """The gradients of one block that are on their way over the dim axis, in one collective at a time."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._queued: list[tuple[Reduction, Tensor]] = []
        self._flying: list[Reduction] = []
        self._wait: Callable[[], list[Tensor]] | None = None

    @property
    def held(self) -> int:
        """Bytes of whole gradients that have not arrived."""
        return sum(one.shard.whole_bytes for one in [*self._flying, *(one for one, _ in self._queued)])

    def send(self, reduction: Reduction, gradient: Tensor) -> None:
        """Sends a gradient off, or has it wait for the next one while they are too few to be worth a collective."""
        self._queued.append((reduction, gradient))
        if sum(one.shard.whole_bytes for one, _ in self._queued) >= reduction.enough:
            self.flush()

    def flush(self) -> None:
        """Sends what is queued, once what was sent before has arrived and let its memory go."""
        self.arrive()
        queued, self._queued = self._queued, []
        self._flying = [reduction for reduction, _ in queued]
        if queued:
            self._wait = start_reducing(
                [one.shard for one in self._flying], [gradient for _, gradient in queued], self._group
            )

    def arrive(self) -> None:
        """Waits for what is on its way."""
        if self._wait is not None:
            for reduction, summed in zip(self._flying, self._wait(), strict=True):
                reduction.summed = summed
            self._flying, self._wait = [], None

    def result(self, reduction: Reduction) -> Tensor | None:
        """This rank's shard of a summed gradient, which nothing holds any longer; None if there is no gradient."""
        if any(queued is reduction for queued, _ in self._queued):
            self.flush()
        if any(flying is reduction for flying in self._flying):
            self.arrive()
        summed, reduction.summed = reduction.summed, None
        return summed


class Reduction:
    """The gradient of one whole, from one use of it.

    Args:
        reducer: through which it goes.
        shard: whose it is.
        enough: bytes of gradients that are worth a collective.
    """

    def __init__(self, reducer: Reducer, shard: Shard, enough: int) -> None:
        self.reducer, self.shard, self.enough = reducer, shard, enough
        self.summed: Tensor | None = None


class Arriving(torch.autograd.Function):
    """Identity of a shard, in whose backward the gradient arrives that `Whole` has sent off.

    Autograd runs the youngest node that is ready: made before the work of a layer is recorded, this one waits until
    backward has done that work.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, reduction: Reduction) -> Tensor:
        ctx.reduction = reduction
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return ctx.reduction.reducer.result(ctx.reduction), None


class Whole(torch.autograd.Function):
    """The whole of a shard, whose gradient is sent off."""

    @staticmethod
    def forward(ctx: Any, arriving: Tensor, reduction: Reduction, take: Callable[[], Tensor]) -> Tensor:
        ctx.reduction = reduction
        return take()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.reduction.reducer.send(ctx.reduction, gradient)
        # Stands for the gradient that arrives later; takes no memory.
        return gradient.new_empty(()).expand(ctx.reduction.shard.parameter.shape), None, None


@contextmanager
def forgotten(whole: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """What is saved of `whole` for backward inside the block is not kept: backward gets what `again` returns."""
    # Autograd saves another tensor object of the same memory.
    address, shape = whole.data_ptr(), whole.shape

    def pack(saved: Tensor) -> Any:
        return again if saved.data_ptr() == address and saved.shape == shape else saved

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
