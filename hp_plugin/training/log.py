"""What a run says: Megatron's log line with tokens/s, TensorBoard scalars and a JSON file of losses."""

from __future__ import annotations

import json
import math
import os
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from hp_plugin.training.step import StepResult, Trainer


class TrainingLog:
    """Collects iterations and reports them from the last rank, which holds the last pipeline stage.

    Use as a context manager: files are complete after the block, also when it is left by an exception.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.losses: dict[int, float] = {}
        self._pending: list[tuple[int, StepResult]] = []
        self._speaks = dist.get_rank() == dist.get_world_size() - 1
        self._writer: Any = None
        if self._speaks and trainer.config.tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(trainer.config.tensorboard_dir)
        self._since = time.perf_counter()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._pending:
            self._report(self._pending[-1][0])
        if self._writer is not None:
            self._writer.close()
        path = self.trainer.config.loss_file
        if self._speaks and path is not None:
            text = json.dumps({str(iteration): loss for iteration, loss in self.losses.items()}, indent=0)
            aside = Path(f"{path}.{os.getpid()}")
            aside.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(text + "\n")
            aside.replace(path)

    def iteration(self, iteration: int, result: StepResult) -> None:
        """Notes one iteration, counted from 1, and prints a line every --log-interval of them."""
        self._pending.append((iteration, result))
        if iteration % self.trainer.config.log_interval == 0:
            self._report(iteration)

    def evaluation(self, iteration: int, split: str, loss: float | None, started: float) -> None:
        """Prints a loss on held-out data; its time, since `started` (`perf_counter`), counts for no iteration."""
        self._since += time.perf_counter() - started
        if not self._speaks or loss is None:
            return
        perplexity = math.exp(min(20, loss))
        print(
            f"{split} loss at iteration {iteration} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity:.6E} |",
            flush=True,
        )
        if self._writer is not None:
            self._writer.add_scalar(f"lm loss {split}", loss, iteration)

    def _report(self, iteration: int) -> None:
        pending, self._pending = self._pending, []
        # Reading the losses waits for the device, so the clock is read after it.
        losses = [math.nan if result.lm_loss is None else result.lm_loss.item() for _, result in pending]
        now = time.perf_counter()
        seconds, self._since = (now - self._since) / len(pending), now
        if not self._speaks:
            return
        self.losses |= {number: loss for (number, _), loss in zip(pending, losses, strict=True)}
        print(self._line(iteration, pending, losses, seconds), flush=True)
        if self._writer is not None:
            self._write_scalars(pending, losses, seconds)

    def _line(self, iteration: int, pending: list[tuple[int, StepResult]], losses: list[float], seconds: float) -> str:
        trainer, last = self.trainer, pending[-1][1]
        kept = [loss for (_, result), loss in zip(pending, losses, strict=True) if not result.skipped]
        parts = [
            f"[{datetime.now():%Y-%m-%d %H:%M:%S.%f}] iteration {iteration:8d}/{trainer.config.train_iters:8d}",
            f"consumed samples: {iteration * trainer.batch_size:12d}",
            f"elapsed time per iteration (ms): {seconds * 1000:.1f}",
            f"tokens/s: {trainer.batch_size * trainer.config.seq_length / seconds:.1f}",
            f"learning rate: {last.learning_rate:.6E}",
            f"global batch size: {trainer.batch_size:5d}",
        ]
        if kept:
            parts.append(f"lm loss: {sum(kept) / len(kept):.6E}")
        parts += [f"{name}: {value:.6E}" for name, value in last.moe.items()]
        parts.append(f"loss scale: {last.loss_scale:.1f}")
        if last.grad_norm is not None:
            parts.append(f"grad norm: {last.grad_norm:.3f}")
        parts += [
            f"number of skipped iterations: {sum(result.skipped for _, result in pending):3d}",
            f"number of nan iterations: {sum(not math.isfinite(loss) for loss in losses):3d}",
        ]
        return " " + " | ".join(parts) + " |"

    def _write_scalars(self, pending: list[tuple[int, StepResult]], losses: list[float], seconds: float) -> None:
        trainer = self.trainer
        for (iteration, result), loss in zip(pending, losses, strict=True):
            scalars = {
                "lm loss": loss,
                "learning-rate": result.learning_rate,
                "loss-scale": result.loss_scale,
                "batch-size": trainer.batch_size,
                "iteration-time": seconds,
                "tokens-per-second": trainer.batch_size * trainer.config.seq_length / seconds,
                **result.moe,
            }
            if result.grad_norm is not None:
                scalars["grad-norm"] = result.grad_norm
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, iteration)


def print_rank_0(text: str) -> None:
    """Prints on the first rank alone."""
    if dist.get_rank() == 0:
        print(text, flush=True)
