"""The parts that a stage's pass is made of, each of which is counted and priced once."""

from __future__ import annotations

from hp_plugin.planner.counts.ends import embedding, head
from hp_plugin.planner.counts.layer import Passes, layer_passes
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.counts.stages import Stage


def parts_of(share: Share, stage: Stage) -> dict[str, int]:
    """How many of each part a virtual stage has: layers of both kinds, what precedes the first and follows the last.

    Where weights move, one layer of a stage is counted with what happens once in it ("ends"), but for tokens that the
    embedding or the output layer have on their ranks already ("embedded", "read").
    """
    counts = {"dense": stage.dense, "moe": stage.moe, "first": int(stage.first), "last": int(stage.last)}
    if share.rule.moves_weights:
        kind = "dense" if stage.dense else "moe"
        counts[kind] -= 1
        moved = zip((stage.first, stage.last), share.moved_ends, ("embedded", "read"), strict=True)
        counts[" ".join([kind, "ends", *(word for here, moves, word in moved if here and moves)])] = 1
    return counts


def passes_of(share: Share, part: str) -> Passes:
    """The programs of a part."""
    if part == "first":
        return embedding(share)
    if part == "last":
        return head(share)
    kind, *words = part.split()
    return layer_passes(share, kind == "moe", "ends" in words, "embedded" not in words, "read" not in words)
