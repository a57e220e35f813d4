"""Ranks take turns on the cores: tried on interpreters of their own, since the policy is the process's."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="scheduling policies are Linux's")

AFTERWARDS = """
import json, os, threading
from hp_plugin.processes.scheduling import take_turns
{before}
take_turns()
found = [os.sched_getscheduler(0)]
thread = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
thread.start(); thread.join()
print(json.dumps(found))
"""


def policies(before: str = "") -> list[int]:
    """Of the thread that called `take_turns` and of one that it started then."""
    command = [sys.executable, "-c", AFTERWARDS.format(before=before)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_it_and_the_threads_it_starts_are_batch_work() -> None:
    assert policies() == [os.SCHED_BATCH, os.SCHED_BATCH]


def test_a_policy_that_was_chosen_stays() -> None:
    idle = "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))"
    assert policies(idle) == [os.SCHED_IDLE, os.SCHED_IDLE]


def test_where_the_call_is_forbidden_everything_stays() -> None:
    refuse = "def refuse(*_): raise PermissionError\nos.sched_setscheduler = refuse"
    assert policies(refuse) == [os.sched_getscheduler(0)] * 2


def test_elsewhere_than_on_linux_nothing_is_called() -> None:
    assert policies("del os.SCHED_BATCH, os.sched_setscheduler") == [os.sched_getscheduler(0)] * 2
