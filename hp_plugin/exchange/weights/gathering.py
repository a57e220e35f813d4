"""When the weights of a block of layers are gathered, and how long they are kept.

One collective gathers all of a layer. The next layer's is on its way while this one works, and every weight goes as
soon as it has been used, so that never more than two layers are there whole. Backward gathers again, downwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hp_plugin.exchange.weights.gradients import Arriving, Reducer, Reduction, Whole, forgotten
from hp_plugin.exchange.weights.shards import Shard, start_gathering


class Chain:
    """The layers of one block, in order: a pass goes up, its backward pass down.

    Nothing may be on its way when an optimizer changes the weights: both passes end with nothing pending, and whatever
    recomputation leaves over goes when the next pass begins.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.reducer = Reducer(group)
        self.layers: list[LayerWeights] = []

    def add(self, modules: Sequence[nn.Module], shards: Sequence[Shard], recomputed: bool) -> LayerWeights:
        """The next layer up, whose parameters belong to these modules."""
        layer = LayerWeights(self, len(self.layers), modules, shards, recomputed)
        self.layers.append(layer)
        return layer

    def begin(self) -> None:
        """A forward pass begins: what an earlier one left over is of no use any longer."""
        if not in_backward():
            for layer in self.layers:
                layer.drop()

    @property
    def held(self) -> int:
        """Bytes of whole weights that are there or on their way, and of whole gradients on theirs."""
        return sum(layer.held for layer in self.layers) + self.reducer.held


class LayerWeights:
    """The sharded parameters of one layer's linears, whole while they are needed.

    Args:
        chain: the block's.
        number: its place there.
        modules: whose parameters they are.
        shards: the parameters.
        recomputed: whether backward may repeat this layer's forward pass, and needs its biases again.
    """

    def __init__(
        self,
        chain: Chain,
        number: int,
        modules: Sequence[nn.Module],
        shards: Sequence[Shard],
        recomputed: bool,
    ) -> None:
        self._chain, self._number, self._modules = chain, number, modules
        self._forward = list(shards)
        self._backward = [shard for shard in shards if shard.saved or recomputed]
        self._wholes: dict[Shard, Tensor] = {}
        self._coming: Sequence[Shard] = ()
        self._wait: Callable[[], list[Tensor]] | None = None
        self._awaited: dict[Shard, tuple[Tensor, Reduction]] = {}

    @property
    def whole_bytes(self) -> int:
        """What all of its wholes take."""
        return sum(shard.whole_bytes for shard in self._forward)

    @property
    def held(self) -> int:
        """Bytes of the wholes that are there or on their way."""
        return sum(shard.whole_bytes for shard in [*self._wholes, *self._coming])

    def begin(self) -> None:
        """The layer's forward pass begins, in backward again if it is recomputed."""
        self._start()
        if torch.is_grad_enabled() and (in_backward() or not self._awaited):
            self._await_gradients()

    def whole(self, shard: Shard) -> Tensor:
        """A whole to use in a forward pass; its gradient comes to the shard summed over the dim axis and cut."""
        arriving, reduction = self._awaited.pop(shard, (None, None))
        if torch.is_grad_enabled() and shard.parameter.requires_grad:
            if reduction is None:
                arriving, reduction = self._arriving(shard)
            whole = Whole.apply(arriving, reduction, lambda: self._take(shard))
        else:
            whole = self._take(shard)
        if not in_backward():
            self._start_next(1, shard.whole_bytes)
        return whole

    @contextmanager
    def forgotten(self, whole: Tensor, shard: Shard) -> Iterator[None]:
        """Inside the block, what autograd would save of a whole is gathered again in backward instead."""
        with forgotten(whole, lambda: self._take_for_backward(shard)):
            yield

    def drop(self) -> None:
        """Lets everything go that is there or on its way."""
        self._arrive()
        self._wholes.clear()
        self._awaited.clear()

    def _start(self) -> None:
        """Gathers the layer in one collective, unless it is there or on its way."""
        if self.held:
            return
        if in_backward():
            self._make_room()
        else:
            publish(self._modules)
        self._coming = self._backward if in_backward() else self._forward
        self._wait = start_gathering(self._coming, self._chain.group)

    def _take(self, shard: Shard) -> Tensor:
        self._start()
        self._arrive()
        # A weight that backward gathers to repeat a forward pass stays until it has been used for gradients, too.
        whole = self._wholes.get(shard) if shard.saved and in_backward() else self._wholes.pop(shard, None)
        if whole is None:
            whole = self._alone(shard)
        # A view of its own, since autograd writes its history into what it is given.
        return whole.view_as(whole)

    def _take_for_backward(self, shard: Shard) -> Tensor:
        self._start()
        self._arrive()
        whole = self._wholes.pop(shard, None)
        if whole is None:
            whole = self._alone(shard)
        if not any(other.saved for other in self._wholes):
            self._wholes.clear()
        # Beside the weight in use there will be its gradient.
        self._start_next(-1, 2 * shard.whole_bytes)
        return whole

    def _alone(self, shard: Shard) -> Tensor:
        """What is needed a second time."""
        return start_gathering([shard], self._chain.group)()[0]

    def _start_next(self, step: int, in_use: int) -> None:
        """Sends for the layer that comes next in this direction, as soon as there is room for it beside this one."""
        number = self._number + step
        if not 0 <= number < len(self._chain.layers):
            return
        layer = self._chain.layers[number]
        if layer.held or self._chain.held + in_use + layer.whole_bytes > 2 * max(self.whole_bytes, layer.whole_bytes):
            return
        layer._start()
        if step > 0 and torch.is_grad_enabled():
            layer._await_gradients()

    def _await_gradients(self) -> None:
        """Makes the places where gradients arrive, before the work is recorded that backward is to do meanwhile."""
        self._awaited = {shard: self._arriving(shard) for shard in self._forward if shard.parameter.requires_grad}

    def _arriving(self, shard: Shard) -> tuple[Tensor, Reduction]:
        # Small ones, of biases and of a projection, go with the next: three or four collectives per layer.
        reduction = Reduction(self._chain.reducer, shard, enough=self.whole_bytes // 4)
        return Arriving.apply(shard.parameter, reduction), reduction

    def _make_room(self) -> None:
        """Lets go what backward will need last, where recomputation has gathered more than two layers."""
        for layer in self._chain.layers:
            if self._chain.held <= self.whole_bytes:
                return
            if layer is not self:
                layer.drop()

    def _arrive(self) -> None:
        if self._wait is not None:
            self._wholes = dict(zip(self._coming, self._wait(), strict=True))
            self._coming, self._wait = (), None


def in_backward() -> bool:
    """Whether autograd is running a backward pass here, in which a forward pass can only be recomputation."""
    return torch._C._current_graph_task_id() != -1


def publish(modules: Sequence[nn.Module]) -> None:
    """Waits for parameters that Megatron's distributed optimizer is still gathering over the data-parallel ranks.

    Its wrapper does so in a hook before each module's own forward pass, which is too late for a weight that is sent
    ahead of it (`--overlap-param-gather`).
    """
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            if getattr(hook, "__module__", None) == "megatron.core.distributed.distributed_data_parallel":
                hook(module, ())
