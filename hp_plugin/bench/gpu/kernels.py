"""Seconds that this device takes for one of the planner's kernels, run by itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hp_plugin.planner.counts.program import FusedAttention, Gemm, Kernel

ROUNDS = 5


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """Median over rounds, after one that does not count; on CUDA by events, so that launching is not in it."""
    work()
    found = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) * 1e-3)
        else:
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
    return max(statistics.median(found), 1e-9)


class Bench:
    """Runs kernels on one device in one dtype, each shape once."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._known: dict[tuple[object, ...], float] = {}

    def seconds(self, kernel: Kernel) -> float:
        """Seconds of a kernel of the planner's (of a `Stream`, of its kernels), the gap behind it not in it."""
        if isinstance(kernel, Gemm):
            return self.product(kernel.batch, kernel.m, kernel.n, kernel.k, kernel.accumulate)
        if isinstance(kernel, FusedAttention):
            causal = kernel.causal and kernel.queries == kernel.keys
            forward = self.attention(kernel.heads, kernel.queries, kernel.keys, kernel.width, causal, False)
            both = self.attention(kernel.heads, kernel.queries, kernel.keys, kernel.width, causal, True)
            seconds = max(both - forward, 0.0) if kernel.backward else forward
            # Chunks of queries see a part of the keys: a kernel per chunk does that part of the work.
            computed = kernel.queries * kernel.keys / (2.0 if causal else 1.0)
            return seconds * min(1.0, kernel.pairs / computed)
        return self.softmax(kernel.bytes) if kernel.slow else self.stream(kernel.bytes)

    def product(self, batch: int, m: int, n: int, k: int, accumulate: bool = False) -> float:
        """A product of m × k by k × n, `batch` times; `accumulate` adds it to an fp32 matrix."""

        def measure() -> float:
            left, right = self._random(batch, m, k), self._random(batch, k, n)
            if not accumulate:
                return seconds_of(lambda: torch.bmm(left, right), self.device)
            into = torch.zeros(batch, m, n, dtype=torch.float32, device=self.device)
            return seconds_of(lambda: into.add_(torch.bmm(left, right)), self.device)

        return self._once(("product", batch, m, n, k, accumulate), measure)

    def attention(self, heads: int, queries: int, keys: int, width: int, causal: bool, backward: bool) -> float:
        """Torch's fused attention forward, or forward and backward."""

        def measure() -> float:
            query, key, value = (
                self._random(1, heads, length, width).requires_grad_(backward) for length in (queries, keys, keys)
            )
            gradient = self._random(1, heads, queries, width)

            def work() -> None:
                with torch.set_grad_enabled(backward):
                    output = scaled_dot_product_attention(query, key, value, is_causal=causal)
                if backward:
                    output.backward(gradient)

            return seconds_of(work, self.device)

        return self._once(("attention", heads, queries, keys, width, causal, backward), measure)

    def stream(self, size: float) -> float:
        """A kernel that reads and writes `size` bytes together."""
        count = max(1, int(size / 2 / self.dtype.itemsize))

        def measure() -> float:
            source = self._random(count)
            target = torch.empty_like(source)
            return seconds_of(lambda: target.copy_(source), self.device)

        return self._once(("stream", count), measure)

    def permuted_copy(self, tokens: int, slots: int, n: int, width: int) -> float:
        """An exchange's copy in front of an all-to-all: `[tokens, slots, n, width]` to `[n, tokens, slots, width]`."""

        def measure() -> float:
            slices = self._random(tokens, slots, n, width)
            return seconds_of(lambda: slices.permute(2, 0, 1, 3).contiguous(), self.device)

        return self._once(("permuted", tokens, slots, n, width), measure)

    def softmax(self, size: float) -> float:
        """Softmax kernels of unfused attention that read and write `size` bytes together."""
        rows = max(1, int(size / 2 / self.dtype.itemsize / 1024))

        def measure() -> float:
            scores = self._random(rows, 1024)
            return seconds_of(lambda: scores.softmax(-1), self.device)

        return self._once(("softmax", rows), measure)

    def adam(self, parameters: int) -> float:
        """A step of Adam on fp32 parameters, as torch fuses it where it can."""

        def measure() -> float:
            weight = torch.nn.Parameter(torch.zeros(parameters, device=self.device))
            weight.grad = torch.ones_like(weight)
            optimizer = torch.optim.AdamW([weight], fused=True)
            return seconds_of(optimizer.step, self.device)

        return self._once(("adam", parameters), measure)

    def gap(self, count: int = 200) -> float:
        """Seconds from one tiny kernel to the next in a stream that the host keeps full."""
        small = torch.zeros(1, device=self.device)

        def work() -> None:
            for _ in range(count):
                small.add_(1.0)

        return seconds_of(work, self.device) / count

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(self.dtype)

    def _once(self, key: tuple[object, ...], measure: Callable[[], float]) -> float:
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]
