"""How the n shards of a dim group make the weight that its head group works with, and the collectives that do it.

Every rank holds stock's TP = P shard of every linear; the n shards of a dim group make the shard of TP = m.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _coalescing_manager


@dataclass(frozen=True, eq=False)
class Shard:
    """One sharded parameter of a linear.

    Along its sharded axis a shard is `runs` equal pieces, and run k of the whole is run k of every rank in turn,
    `[runs, n, length]`: one per head slot of QKV, per head of the projection, for gate and up of a gated MLP, else one.

    Args:
        module, name: where this rank's shard is.
        axis: its sharded axis, 0 or 1.
        runs: the pieces of that axis.
        n: size of the dim group.
    """

    module: nn.Module
    name: str
    axis: int
    runs: int
    n: int

    @property
    def parameter(self) -> nn.Parameter:
        """This rank's shard; looked up, since moving a module may make its parameters anew."""
        return getattr(self.module, self.name)

    @property
    def saved(self) -> bool:
        """Whether backward needs the whole again: a weight it does, a bias it does not."""
        return self.parameter.dim() > 1

    @property
    def whole_bytes(self) -> int:
        """What the whole takes."""
        return self.n * self.parameter.numel() * self.parameter.element_size()

    def rows(self, shard: Tensor) -> Tensor:
        """A shard as `[runs, length, ..]`, sharded axis first and contiguous: what is sent."""
        return shard.movedim(self.axis, 0).contiguous().unflatten(0, (self.runs, -1))

    def whole_rows(self, whole: Tensor) -> Tensor:
        """The whole as `[runs, n, length, ..]`, sharded axis first and contiguous: what is received."""
        return whole.movedim(self.axis, 0).contiguous().unflatten(0, (self.runs, self.n, -1))

    def shard_of(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`, a view."""
        return rows.flatten(0, 1).movedim(0, self.axis)

    def whole_of(self, rows: Tensor) -> Tensor:
        """The inverse of `whole_rows`, a view: nothing is copied to make the weight that a linear multiplies by."""
        return rows.flatten(0, 2).movedim(0, self.axis)

    def empty_rows(self) -> Tensor:
        """Memory for the whole, `[runs, n, length, ..]`."""
        shape = list(self.parameter.shape)
        length = shape.pop(self.axis) // self.runs
        return self.parameter.new_empty((self.runs, self.n, length, *shape), requires_grad=False)


def start_gathering(shards: Sequence[Shard], group: dist.ProcessGroup) -> Callable[[], list[Tensor]]:
    """Begins to gather over the dim axis, in one collective; what waits for it returns the wholes of these shards.

    Receives (n-1)/n of them. Each has memory of its own, so that it can go when it has been used.
    """
    sent = [shard.rows(shard.parameter.detach()) for shard in shards]
    if dist.get_backend(group) == "gloo":
        return _start_gathering_flat(shards, sent, group)
    received = [shard.empty_rows() for shard in shards]
    with _coalescing_manager(group, async_ops=True) as work:
        for into, rows in zip(received, sent, strict=True):
            for run, piece in zip(into, rows, strict=True):
                dist.all_gather_into_tensor(run.flatten(0, 1), piece, group=group)

    def wait() -> list[Tensor]:
        work.wait()
        sent.clear()  # until now it had to live
        return [shard.whole_of(rows) for shard, rows in zip(shards, received, strict=True)]

    return wait


def _start_gathering_flat(
    shards: Sequence[Shard], sent: Sequence[Tensor], group: dist.ProcessGroup
) -> Callable[[], list[Tensor]]:
    """The same for gloo, side by side in one tensor, as gloo itself lays what it gathers coalesced.

    Two threads run a gloo group's collectives, and write the name of what they have done into one string that nothing
    guards (torch 2.13.0, `ProcessGroupGloo::runLoop`). Up to 15 characters stay in place; a longer name moves the
    string's memory, which the other thread may be writing to: ALLGATHER_COALESCED, beside the gather of keys and
    values, ended trainings on 4 ranks within some 1,000 to 6,000 micro-batches.
    """
    own = torch.cat([rows.flatten() for rows in sent])
    parts = own.new_empty(group.size(), own.numel())
    work = dist.all_gather_into_tensor(parts.view(-1), own, group=group, async_op=True)
    shapes = [rows.shape for rows in sent]

    def wait() -> list[Tensor]:
        work.wait()
        wholes = []
        for shard, shape, part in zip(shards, shapes, parts.split([s.numel() for s in shapes], dim=1), strict=True):
            # [n, runs · length · ..] -> [runs, n, length, ..]
            wholes.append(shard.whole_of(part.unflatten(1, shape).transpose(0, 1).contiguous()))
        return wholes

    return wait


def start_reducing(
    shards: Sequence[Shard], gradients: Sequence[Tensor], group: dist.ProcessGroup
) -> Callable[[], list[Tensor]]:
    """Begins to sum gradients of wholes over the dim axis; what waits for it returns this rank's shards of the sums.

    Sends (n-1)/n of the gradients, in one collective.
    """
    rows = [shard.whole_rows(gradient) for shard, gradient in zip(shards, gradients, strict=True)]
    if dist.get_backend(group) == "gloo":
        return _start_adding(shards, rows, group)
    sums = [torch.empty_like(one[:, 0]) for one in rows]
    with _coalescing_manager(group, async_ops=True) as work:
        for into, whole in zip(sums, rows, strict=True):
            for run, piece in zip(into, whole, strict=True):
                dist.reduce_scatter_tensor(run, piece.flatten(0, 1), group=group)

    def wait() -> list[Tensor]:
        work.wait()
        return [shard.shard_of(one) for shard, one in zip(shards, sums, strict=True)]

    return wait


def _start_adding(shards: Sequence[Shard], rows: list[Tensor], group: dist.ProcessGroup) -> Callable[[], list[Tensor]]:
    """The same for gloo, which makes an all-reduce of a reduce-scatter: twice the bytes."""
    # [runs, n, length, ..] -> [n, runs · length · ..]: to every rank its part
    parts = [one.transpose(0, 1).flatten(1) for one in rows]
    sent = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0].contiguous()
    received = torch.empty_like(sent)
    work = dist.all_to_all_single(received, sent, group=group, async_op=True)

    def wait() -> list[Tensor]:
        work.wait()
        sums = received.sum(dim=0).split([part.shape[1] for part in parts])
        return [
            shard.shard_of(one.view(whole[:, 0].shape)) for shard, one, whole in zip(shards, sums, rows, strict=True)
        ]

    return wait
