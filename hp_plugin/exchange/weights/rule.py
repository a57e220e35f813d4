"""What `weights` needs, moves and keeps."""

from __future__ import annotations

from typing import Any

from hp_plugin.exchange.rule import ExchangeRule
from hp_plugin.exchange.sizes import AttentionShape, BlockShape, Cached, Inner, cached_by_tokens
from hp_plugin.refusal import Refusal


def embedding_moves_less(vocabulary: int, tokens: int, m: int, size: int, sequence_parallel: bool) -> bool:
    """Whether it is less to gather the embedding's weight over the dim axis than to spread its tokens, in training.

    With V/m rows there and their gradient back, and hidden states of t/n tokens all-reduced by m ranks, in place of
    all-reducing those of t tokens by P and gathering their gradient over the dim axis; per (n-1)/n · D that is 2V/m
    against 3t. With sequence parallelism stock scatters in place of all-reducing, and tokens go to their shares from
    there: 2V/m against 2t + 2t/P.
    """
    return vocabulary < m * tokens * ((1 + 1 / size) if sequence_parallel else 1.5)


def output_moves_less(vocabulary: int, tokens: int, m: int, size: int, sequence_parallel: bool) -> bool:
    """The same for the output layer, whose weight is gathered twice: 3V/m against 3t, or against 3t + 2t/P."""
    return vocabulary < m * tokens * ((1 + 2 / (3 * size)) if sequence_parallel else 1)


class WeightsRule(ExchangeRule):
    """Gather the weights of a dim group before they are used; every rank runs a share of the micro-batch at TP = m.

    The share is b/n samples where n divides b, else s/n tokens of each, an early and a late chunk.
    """

    name = "weights"
    moves = "all-gather of weights, reduce-scatter of their gradients; tokens at the ends of a block of layers"
    moves_weights = latent = True
    head_axis = True

    def cannot(self, config: Any) -> tuple[str, ...]:
        balancing = getattr(config, "moe_router_load_balancing_type", None)
        kinds = balancing if isinstance(balancing, list) else [balancing]
        graphs = getattr(config, "cuda_graph_impl", "none") != "none" or getattr(config, "enable_cuda_graph", False)
        inference = getattr(config, "transformer_impl", None) == "inference_optimized"
        wanted = (
            (config.context_parallel_size > 1, f"do context parallelism ({config.context_parallel_size})"),
            (inference, "use --transformer-impl inference_optimized"),
            (bool(getattr(config, "fp8", None) or getattr(config, "fp4", None)), "do fp8 or fp4"),
            # Stock would cut them over the TP group, whose ranks have different ones.
            (getattr(config, "distribute_saved_activations", False), "do --distribute-saved-activations"),
            # Layers are captured one by one, and each gathers for the next.
            (graphs, "be captured in CUDA graphs"),
            # Both take layers apart and run their parts by themselves.
            (getattr(config, "overlap_moe_expert_parallel_comm", False), "do --overlap-moe-expert-parallel-comm"),
            (getattr(config, "delay_wgrad_compute", False), "do --delay-wgrad-compute"),
            (getattr(config, "defer_embedding_wgrad_compute", False), "do --defer-embedding-wgrad-compute"),
            # Stock adds up a sequence's tokens over the TP group, whose ranks have those of different ones.
            ("seq_aux_loss" in kinds, "balance experts by seq_aux_loss"),
        )
        return tuple(what for asked, what in wanted if asked)

    def missing(self, shape: AttentionShape) -> str | None:
        if shape.b % shape.n and shape.behind_cache:
            return (
                "needs a batch size divisible by n behind a key/value cache, since a token more cannot be spread: "
                f"{shape.b} % {shape.n} = {shape.b % shape.n}"
            )
        if shape.b % shape.n and shape.s % (2 * shape.n):
            return (
                "needs a micro-batch size divisible by n, or a sequence length divisible by 2n (an early and a late "
                f"chunk for each of the n ranks): {shape.b} % {shape.n} = {shape.b % shape.n}, "
                f"{shape.s} % {2 * shape.n} = {shape.s % (2 * shape.n)}"
            )
        return None

    def refusal(self, shape: AttentionShape) -> Refusal | None:
        if shape.stock_core_alone and shape.b % shape.n:
            said = f"`{self.name}` spreads the tokens of {shape.b} samples over n = {shape.n} ranks and"
            return Refusal("feature", f"{said} cannot {' or '.join(shape.stock_core_alone)} then")
        return super().refusal(shape)

    def inner(self, shape: AttentionShape) -> Inner:
        if shape.b % shape.n == 0:
            return Inner(shape.b // shape.n, shape.s, shape.d)
        return Inner(shape.b, shape.s // shape.n, shape.d)

    def cached(self, shape: AttentionShape) -> Cached:
        if shape.b % shape.n == 0:
            return Cached(shape.b // shape.n, shape.cache, shape.d)
        return cached_by_tokens(shape)

    def gathered(self, shape: AttentionShape) -> int:
        return 0 if shape.b % shape.n == 0 else shape.n * shape.key_value_slots * shape.slice_size

    def kept(self, shape: AttentionShape) -> int:
        # Other ranks' keys and values.
        return (shape.n - 1) * self.gathered(shape) // shape.n

    def elements(self, shape: AttentionShape) -> int:
        """What attention itself moves: keys and values, where the tokens of a sample are spread."""
        return (shape.n - 1) * self.gathered(shape) // shape.n

    def moves_ends(self, shape: AttentionShape, vocabulary: int, sequence_parallel: bool) -> tuple[bool, bool]:
        sizes = (vocabulary, shape.s * shape.b, shape.m, shape.m * shape.n, sequence_parallel)
        return embedding_moves_less(*sizes), output_moves_less(*sizes)

    def leaving(self, shape: AttentionShape, head_innermost: bool = False) -> float:
        """The part of stock's P-th of a sequence that a mean rank sends away at an end of a block.

        Of b/n samples (n-1)/n, and more where neighbours split heads; of tokens what lies outside of the own m-th
        of an early and a late chunk.
        """
        s, m, n = shape.s, shape.m, shape.n
        if shape.b % n == 0 and not head_innermost:
            return (n - 1) / n
        part, kept = s // (m * n), 0.0
        for rank in range(m * n):
            i, j = (rank % m, rank // m) if head_innermost else (rank // n, rank % n)
            first = rank * part
            for start, stop in self._own(shape, i, j):
                kept += max(0, min(first + part, stop) - max(first, start))
        return 1 - kept / s / (n if shape.b % n == 0 else 1)

    @staticmethod
    def _own(shape: AttentionShape, i: int, j: int) -> list[tuple[int, int]]:
        """Positions that rank (i, j) has inside: an m-th of all, or of an early chunk with a late one behind it."""
        s, m, n = shape.s, shape.m, shape.n
        if shape.b % n == 0:
            return [(i * (s // m), (i + 1) * (s // m))]
        part, chunk, found = s // (m * n), s // (2 * n), []
        for place, number in enumerate((j, 2 * n - 1 - j)):
            start, stop = max(i * part, place * chunk), min((i + 1) * part, (place + 1) * chunk)
            shift = (number - place) * chunk
            found += [(start + shift, stop + shift)] if start < stop else []
        return found

    def pass_bytes(self, block: BlockShape, itemsize: int, training: bool) -> float:
        """As every rule's: linears run at TP = m on an n-th of the tokens, for which weights come and gradients go."""
        m, n = block.attention.m, block.attention.n
        part = (n - 1) / n
        linears = block.sums(training) * (m - 1) / (m * n) * block.hidden
        # Weights in forward, again in backward, and their gradients; biases are not needed a second time,
        # unless forward is repeated; the weight that comes for that stays until its gradient is there.
        again = 1 if block.recompute else 0
        gathered = (3 * block.weights + (2 + again) * block.biases) if training else block.weights + block.biases
        # A block's share of the tokens costs nothing to take and a gather to give back; backward is the reverse. With
        # sequence parallelism each is an all-to-all of a P-th of them.
        end = 2 * self.leaving(block.attention) / (m * n) if block.sequence_parallel else part
        ends = (2 + again if training else 1) * end
        ends *= block.blocks + (block.moe if block.whole_tokens else 0)
        moved = linears + part * gathered / m + ends * block.hidden - self._shared_ends(block, training, end)
        return moved * itemsize + self._attention_bytes(block, itemsize, training)

    def _shared_ends(self, block: BlockShape, training: bool, end: float) -> float:
        """Elements that are not sent because embedding and output layer work on a share: see `embedding_moves_less`.

        Of stock's ends a head group sums its n-th of the tokens only, no end of the block is beside them, and the
        weight is gathered instead. `end` is what one end of a block moves, for each element of the hidden states.
        """
        m, n, size = block.attention.m, block.attention.n, block.attention.m * block.attention.n
        again = training and block.recompute
        tokens, weight = 0.0, 0
        if block.embedding_shared:
            # Summed, or with sequence parallelism scattered, and gathered again in backward.
            around = (2 if training else 1) if block.sequence_parallel else 2
            # Cutting tokens sends nothing; bringing back their gradient does.
            cut = (1 + training + again) / 2 if block.sequence_parallel else training
            tokens, weight = tokens + around * (size - m) / size + cut * end, weight + (2 if training else 1)
        if block.output_shared:
            around = (3 if training else 1) if block.sequence_parallel else (2 if training else 0)
            joined = (1 + training + again) / 2 if block.sequence_parallel else 1 + again
            tokens, weight = tokens + around * (size - m) / size + joined * end, weight + (3 if training else 1)
        return tokens * block.hidden - weight * (n - 1) / n * block.vocabulary * block.D / m
