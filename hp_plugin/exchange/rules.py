"""The exchanges by name, and what `auto` makes of a shape; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hp_plugin.exchange.batch.rule import BatchRule
from hp_plugin.exchange.local.rule import LocalRule
from hp_plugin.exchange.rule import ExchangeRule
from hp_plugin.exchange.scores.rule import ScoresRule
from hp_plugin.exchange.sequence.rule import SequenceRule
from hp_plugin.exchange.sizes import AttentionShape, BlockShape
from hp_plugin.exchange.weights.rule import WeightsRule, embedding_moves_less, output_moves_less
from hp_plugin.refusal import RefusedError

RULES: dict[str, ExchangeRule] = {
    rule.name: rule for rule in (BatchRule(), SequenceRule(), ScoresRule(), WeightsRule(), LocalRule())
}
AUTO = "auto"
"""The choice that is left to each micro-batch's shape."""
AUTO_ORDER = ("batch", "sequence", "scores")
"""What `auto` takes where activations move: of equals the first."""
MOVING_WEIGHTS = tuple(name for name, rule in RULES.items() if rule.moves_weights)
"""What it takes where weights do."""
IDENTITY = "batch"
"""What runs where there is one slice: nothing is exchanged then, whatever the name."""

EXCHANGES = (*RULES, AUTO)


def candidates(exchange: str, n: int, whole_layers: bool = True) -> tuple[str, ...]:
    """The exchanges that a layer with n slices may have to run under this choice.

    `whole_layers` says whether all of the layer knows of them, as it has to where weights move.
    """
    if n == 1:
        return (IDENTITY,)
    if exchange != AUTO:
        return (exchange,)
    return (*AUTO_ORDER, *MOVING_WEIGHTS) if whole_layers else AUTO_ORDER


def resolve(exchange: str, shape: AttentionShape) -> str:
    """An exchange that `exchange` stands for and that can carry this shape: for `auto` the first in its order.

    Raises:
        RefusedError: there is none; says why, and which exact ones can.
    """
    return next(iter(_carrying(exchange, shape)))


def traded(exchange: str, shape: AttentionShape, training: bool, itemsize: int) -> str:
    """What a pass whose activations move trades around this attention: for `auto` what sends fewest bytes.

    Raises:
        RefusedError: as `resolve`.
    """

    def sent(name: str) -> int:
        rule = RULES[name]
        return rule.bytes(shape, itemsize) + (rule.bytes_backward(shape, itemsize) if training else 0)

    return min(_carrying(exchange, shape), key=sent)


def _carrying(exchange: str, shape: AttentionShape) -> list[str]:
    if shape.n == 1:
        return [IDENTITY]
    # What carries weights carries no shape that these do not.
    names = AUTO_ORDER if exchange == AUTO else (exchange,)
    refusals = {name: RULES[name].refusal(shape) for name in names}
    found = [name for name, refusal in refusals.items() if refusal is None]
    if not found:
        raise RefusedError([refusal for refusal in refusals.values() if refusal], "exchange ", way_out(fitting(shape)))
    return found


@dataclass(frozen=True)
class Counted:
    """Bytes that a rank sends while one micro-batch passes a block, by exchange, fewest first; those that fit."""

    bytes: dict[str, float]

    @property
    def name(self) -> str:
        """The exchange that sends fewest."""
        return next(iter(self.bytes))

    @property
    def reason(self) -> str:
        """What each sends, for people."""
        return ", ".join(f"{name} {sent / 1e6:,.2f} MB" for name, sent in self.bytes.items())


def choose(
    exchange: str, block: BlockShape, training: bool, itemsize: int, able: Callable[[ExchangeRule], bool] | None = None
) -> Counted:
    """What a pass through this block moves: for `auto` whatever sends fewest, with what the others would have sent.

    Args:
        able: of `auto`: whether an exchange can be taken at all, if not all of them can.

    Raises:
        RefusedError: none that `exchange` stands for can carry the shape.
    """
    resolve(exchange, block.attention)
    names = candidates(exchange, block.attention.n)
    if exchange == AUTO and able is not None:
        names = tuple(name for name in names if able(RULES[name]))
    return count(block, training, itemsize, names)


def with_shared_ends(block: BlockShape, vocabulary: int) -> BlockShape:
    """The block with embedding and output layer at its ends, on a share of the tokens if weights move and that is less.

    Of a model that is made for micro-batches of this shape, without multi-token prediction.
    """
    shape = block.attention
    sizes = (vocabulary, shape.s * shape.b, shape.m, shape.m * shape.n, block.sequence_parallel)
    return replace(
        block,
        vocabulary=vocabulary,
        embedding_shared=embedding_moves_less(*sizes),
        output_shared=output_moves_less(*sizes),
    )


def count(block: BlockShape, training: bool, itemsize: int = 2, names: Sequence[str] | None = None) -> Counted:
    """What every exact exchange (of `names`) that can carry this block sends in one pass, forward only or `training`.

    Depends on nothing that differs between ranks. Of equals the first of `RULES` comes first.

    Raises:
        RefusedError: none can carry it.
    """
    shape = block.attention
    if shape.n == 1:
        return Counted({IDENTITY: RULES[IDENTITY].pass_bytes(block, itemsize, training)})
    asked = [name for name, rule in RULES.items() if (rule.exact if names is None else name in names)]
    refusals = {name: RULES[name].refusal(shape) for name in asked}
    sent = {
        name: RULES[name].pass_bytes(block, itemsize, training) for name, refused in refusals.items() if refused is None
    }
    if not sent:
        raise RefusedError([refused for refused in refusals.values() if refused is not None], "exchange ")
    return Counted(dict(sorted(sent.items(), key=lambda one: one[1])))


def fitting(shape: AttentionShape) -> list[str]:
    """The exact exchanges that can carry this shape, cheapest first."""
    return [name for name in AUTO_ORDER if RULES[name].refusal(shape) is None]


def way_out(names: list[str], condition: str = "") -> str:
    """Names of exchanges that were found fit, as the end of a refusal; empty if there are none."""
    return f"; --head-dim-exchange {' or '.join(names)} can{condition}" if names else ""
