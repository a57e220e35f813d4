"""What is run: training steps, forward passes or decode steps, and over how many tokens."""

from __future__ import annotations

from dataclasses import dataclass

from hp_plugin.refusal import shown

MAX_SEQ = 2**24
"""Tokens of a sequence beyond which a number is taken for a typing error."""
MAX_BATCH = 2**24
"""Sequences of a step beyond which one is."""
MODES = ("train", "forward", "decode")


@dataclass(frozen=True)
class Workload:
    """One global step.

    Args:
        mode: `train`, `forward` (training's forward pass alone), or `decode` (one token for each of `global_batch`
            sequences that already have `seq` tokens; all wait for the sampled tokens before the next step, as in
            Megatron-Core's inference, unless `continuous`: then micro-batches follow each other without a gap).
        seq: tokens per sequence; in decode, the context length.
        global_batch: sequences per step over all ranks.
        itemsize: bytes of a weight or activation element.
        grad_itemsize: bytes of a reduced gradient element (Megatron reduces in fp32 for bf16 by default).

    Raises:
        ValueError: an unknown mode, or sizes that are not positive.
    """

    mode: str = "train"
    seq: int = 2048
    global_batch: int = 1024
    itemsize: int = 2
    grad_itemsize: int = 4
    continuous: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {shown(self.mode)}: choose from {', '.join(MODES)}")
        if self.continuous and self.mode != "decode":
            raise ValueError(f"continuous concerns decode, not {self.mode}")
        for name, most in (("seq", MAX_SEQ), ("global_batch", MAX_BATCH), ("itemsize", 8), ("grad_itemsize", 8)):
            if not 1 <= getattr(self, name) <= most:
                said = "at least 1" if getattr(self, name) < 1 else f"at most {most:,}"
                raise ValueError(f"{name.replace('_', ' ')} must be {said}, got {shown(getattr(self, name))}")

    @property
    def training(self) -> bool:
        """Whether there is a backward pass."""
        return self.mode == "train"

    @property
    def new_tokens_per_sequence(self) -> int:
        """Positions of each sequence that one step computes."""
        return 1 if self.mode == "decode" else self.seq

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one global step computes."""
        return self.global_batch * self.new_tokens_per_sequence
