"""A rank that refuses to start is heard once, and no other waits for it, by the store in which ranks meet anyway."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from hp_plugin.refusal import shown

REFUSED = 2
_READY, _GO, _LEFT, _SAID = "hp_plugin/ready", "hp_plugin/go", "hp_plugin/left", "hp_plugin/said/"
_MEETING = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_TO_CONNECT = timedelta(seconds=20)


def refuse(message: str, program: str | None = None) -> NoReturn:
    """Says a message on the first rank that has it, tells all others to stop waiting, and ends with status 2.

    Args:
        message: one line.
        program: what the line begins with (default: the script's name).

    Raises:
        SystemExit: always.
    """
    try:
        store, first = _tell(message)
    except Exception:  # no store is no reason to say nothing
        store, first = None, True
    if first:
        rank = "" if store is not None or "RANK" not in os.environ else f" (on rank {_rank()})"
        print(f"{program or Path(sys.argv[0]).name}: error: {message}{rank}", file=sys.stderr, flush=True)
    if store is not None and hosts_store():
        _let_others_leave(store)
    raise SystemExit(REFUSED)


def wait_for_others(store: Any, timeout: timedelta) -> None:
    """Returns when every rank of the world has come this far; `store` is a `torch.distributed.Store`.

    Raises:
        SystemExit: status 2, if one of them has refused to; it has said why.
        TimeoutError: not all of them came.
    """
    if not tells_apart_restarts():
        return
    if store.add(_READY, 1) == world_size():
        store.set(_GO, "yes")
    try:
        store.wait([_GO], timeout)
    except Exception as late:  # of another kind in every release of torch
        came = store.add(_READY, 0)
        raise TimeoutError(f"{came} of {world_size()} ranks are here after {timeout}: are all started?") from late
    if store.get(_GO) != b"yes":
        store.add(_LEFT, 1)
        raise SystemExit(REFUSED)


def connect(timeout: timedelta) -> Any:
    """The store at the address that the launcher has announced, with a prefix of its own for every restart.

    torchrun keeps its store over restarts: without a prefix, new ranks would look for dead ones. (Nodes count restarts
    separately, so over several of them the way out is torchrun's own, in docs/checkpoints.md.)
    """
    import torch.distributed as dist

    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size(),
        is_master=hosts_store(),
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    on_one_node = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return dist.PrefixStore(f"restart{restarts}", store) if _agent_has_store() and on_one_node else store


def world_size() -> int:
    """Ranks that the launcher announces, 1 without one.

    Raises:
        ValueError: what it announces is no positive number, or it does not say where ranks meet.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch("[0-9]{0,8}[1-9][0-9]{0,8}", text):
        raise ValueError(f"WORLD_SIZE must be a number of ranks of at least 1, got {shown(text)}: use torchrun")
    if "RANK" in os.environ:
        rank, host, port = (os.environ.get(name, "") for name in _MEETING)  # set with "RANK"
        if not (re.fullmatch("[0-9]{1,9}", rank) and int(rank) < int(text)):
            raise ValueError(f"RANK must be a number below WORLD_SIZE {int(text)}, got {shown(rank)}: use torchrun")
        if not (host and re.fullmatch("[0-9]{1,5}", port) and int(port) < 2**16):
            raise ValueError(f"ranks meet at MASTER_ADDR {shown(host)}, MASTER_PORT {shown(port)}: use torchrun")
    return int(text)


def hosts_store() -> bool:
    """Whether this rank keeps the store for all of them, as the first does where there is no torchrun."""
    return not _agent_has_store() and _rank() == "0"


def tells_apart_restarts() -> bool:
    """Whether what is in the store is this attempt's: on one node, or in the first attempt."""
    return os.environ.get("GROUP_WORLD_SIZE", "1") == "1" or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _agent_has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _tell(message: str) -> tuple[Any, bool]:
    """The store, None in a world of one, and whether nobody has said this message yet."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        return None, True
    store = connect(_TO_CONNECT)
    first = store.add(_SAID + hashlib.sha256(message.encode()).hexdigest()[:16], 1) == 1
    if tells_apart_restarts():
        store.set(_GO, "no")
    store.add(_LEFT, 1)
    return store, first


def _let_others_leave(store: Any) -> None:
    until = time.monotonic() + _TO_CONNECT.total_seconds()
    while store.add(_LEFT, 0) < world_size() and time.monotonic() < until:
        time.sleep(0.05)
