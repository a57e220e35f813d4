"""`gathered`: whole heads of the whole micro-batch, on every rank of the dim group."""

from hp_plugin.exchange.gathered.rule import GatheredRule
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from hp_plugin.exchange.strategy import Exchange


class GatheredExchange(Exchange):
    """All ranks of a dim group work on the same heads; backward sums what their slices of the output ask for."""

    rule = GatheredRule()

    def to_heads(self, mixed: Tensor) -> Tensor:
        """[s, b, slots · d/n] -> [s, b, slots · d]."""
        s, b, _ = mixed.shape
        slices = gather_from_sequence_parallel_region(mixed, group=self.groups.dim)
        # [n · s, b, slots · d/n] -> [s, b, slots · d]: the slices of a head side by side
        blocks = slices.view(self.n, s, b, self.layout.slots, self.layout.width)
        return blocks.permute(1, 2, 3, 0, 4).reshape(s, b, -1)

    def to_slices(self, context: Tensor) -> Tensor:
        """[s, b, h/m · d] -> [s, b, h/m · d/n]."""
        s, b, _ = context.shape
        return context.view(s, b, self.layout.heads, self.n, self.layout.width)[:, :, :, self.j].reshape(s, b, -1)
