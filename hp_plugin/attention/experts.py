"""Megatron-Core's experts with their parameters marked by which ranks hold them; as upstream, it marks half of them."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe import experts as stock


class _MarkedExperts:
    """Experts whose gradients are summed over exactly the ranks that hold the same ones, and counted once in norms.

    Megatron-Core goes by three marks, and sets them for experts as if expert-parallel ranks alone could differ from
    the dense model's:

    * `allreduce` false reduces over the ranks that hold an expert. Stock sets it where experts are spread
      (EP > 1); with EP = 1 and fewer ranks per expert than tensor-parallel ones the TP ranks hold copies that see
      different tokens, and each copy would keep its own share of the gradient.
    * `sequence_parallel` sums over the TP group. Stock sets it for output biases, where TP ranks hold other experts.
    * `tensor_model_parallel` false counts a parameter on the first TP rank only. Stock leaves it so for output biases.

    Source: `megatron.core.distributed.DistributedDataParallel`, `finalize_model_grads`,
    `megatron.core.optimizer.clip_grads`, which read them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ranks, shared_by = self.tp_group.size(), self.ep_group.size()  # type: ignore[attr-defined]
        tensor_parallel = self.config.tensor_model_parallel_size  # type: ignore[attr-defined]
        for parameter in self.parameters():  # type: ignore[attr-defined]
            if ranks != tensor_parallel or shared_by > 1:
                parameter.allreduce = False
            parameter.sequence_parallel = False
            if ranks == 1:
                parameter.tensor_model_parallel = True


MARKED_EXPERTS: dict[type, type] = {
    base: type(name, (_MarkedExperts, base), {"__doc__": _MarkedExperts.__doc__, "__module__": __name__})
    for name in ("SequentialMLP", "GroupedMLP", "TEGroupedMLP")
    # Releases differ in which of them they have.
    if isinstance(base := getattr(stock, name, None), type)
}
"""Stock's kinds of experts and what stands in for each."""
