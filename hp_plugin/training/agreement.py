"""What ranks agree on before they go on: the same options at the start, and later whether an iteration is the last."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import torch
import torch.distributed as dist

from hp_plugin.processes.interrupts import Stop
from hp_plugin.refusal import shorten
from hp_plugin.training.config import TrainingConfig

_MAY_DIFFER = frozenset({"data_cache_path", "tensorboard_dir", "loss_file"})


class DisagreementError(ValueError):
    """The ranks of one run were started with different options; the message says which, and who has what."""


def require_agreement(config: TrainingConfig, device: torch.device) -> None:
    """Compares the configuration over the default group: 32 bytes per rank, and the options only if those differ.

    Raises:
        DisagreementError: on every rank, naming the options that differ and who has what.
    """
    options = {name: value for name, value in asdict(config).items() if name not in _MAY_DIFFER}
    digest = hashlib.sha256(repr(sorted(options.items())).encode()).digest()
    mine = torch.tensor(list(digest), dtype=torch.uint8, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    # All ranks see all digests, so either all return here or all go on to the next collective.
    if all(torch.equal(mine, other) for other in everyone):
        return
    gathered: list[dict[str, object]] = [{} for _ in everyone]
    dist.all_gather_object(gathered, options)
    complaints = []
    for name in options:
        ranks_of: dict[object, list[int]] = {}
        for rank, theirs in enumerate(gathered):
            ranks_of.setdefault(theirs.get(name), []).append(rank)
        if len(ranks_of) > 1:
            held = "; ".join(f"{shorten(str(value))} on {_ranks(ranks)}" for value, ranks in ranks_of.items())
            complaints.append(f"--{name.replace('_', '-')} is {held}")
    raise DisagreementError("the ranks were started with different options: " + ", ".join(complaints))


def stop_is_asked_for(config: TrainingConfig, stop: Stop, device: torch.device) -> bool:
    """Whether a signal has asked any rank to end; with --exit-signal-handler, a collective call."""
    if not config.exit_signal_handler:
        return False
    asked = torch.tensor([stop.signal], dtype=torch.int32, device=device)
    dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    stop.signal = int(asked)
    return stop.signal != 0


def _ranks(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:4])) + (" …" if len(ranks) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"
