"""The harness itself: order, failures, time-outs, and that no job sees another."""

import multiprocessing
import os
import time
import warnings
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tests.ranks import RankError, Ranks

kept: list[Any] = []


def rank_and_sum(offset: int) -> tuple[int, float, int]:
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"no luck on {rank}")
    dist.barrier()


def wait_for_nobody() -> None:
    if dist.get_rank() != 0:
        dist.barrier()
    time.sleep(60)


def exit_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def start_a_server() -> int:
    multiprocessing.current_process()._config["daemon"] = False  # daemons, which ranks are, may have no children
    kept.append(multiprocessing.get_context("spawn").Manager())
    return kept[0]._process.pid


def warn() -> None:
    warnings.warn("look out", UserWarning, stacklevel=1)


def use_model_parallel(tp: int) -> tuple[int, bool, list[float]]:
    was_clean = not parallel_state.model_parallel_is_initialized()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    total = torch.ones(1)
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    # Named after its ranks, so the next job's group meets what this one left behind, if anything is; the odd
    # ranks come late so that the even ones look for them before they are there.
    pair = [2 * (dist.get_rank() // 2), 2 * (dist.get_rank() // 2) + 1]
    time.sleep(0.2 * (dist.get_rank() % 2))
    local = dist.new_group(pair, use_local_synchronization=True)
    dist.all_reduce(total, group=local)
    return len(dist.distributed_c10d._world.pg_map), was_clean, [total.item(), torch.rand(1).item()]


def test_results_come_in_rank_order_from_processes_that_stay(ranks: Ranks) -> None:
    first = ranks.run(4, rank_and_sum, 1)
    assert [(rank, total) for rank, total, _ in first] == [(r, 10.0) for r in range(4)]
    second = ranks.run(4, rank_and_sum, 2)
    assert [pid for *_, pid in second] == [pid for *_, pid in first]
    assert [total for _, total, _ in ranks.run(2, rank_and_sum, 0)] == [1.0, 1.0]


def test_a_failure_shows_the_traceback_and_the_pool_works_again(ranks: Ranks) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(4, fail_on, 2)
    text = str(caught.value)
    assert "failed on [2], still running on [0, 1, 3]" in text
    assert "ValueError: no luck on 2" in text
    assert "in fail_on" in text
    assert text.count("still running, its stack") == 3 and text.count("in barrier") >= 3
    assert [rank for rank, *_ in ranks.run(4, rank_and_sum, 0)] == [0, 1, 2, 3]


def test_a_hang_is_killed_and_every_stack_shown(ranks: Ranks) -> None:
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks.run(2, wait_for_nobody, timeout=1.5)
    assert time.monotonic() - start < 20
    text = str(caught.value)
    assert "still running on [0, 1]" in text
    assert text.count("in wait_for_nobody") == 2 and "in barrier" in text
    assert len(ranks.run(2, rank_and_sum, 0)) == 2


def test_a_dead_rank_is_named(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"rank 1 failed ---\ndied with exit code 7"):
        ranks.run(2, exit_on, 1)


def test_warnings_are_errors_on_the_ranks_as_in_the_test(ranks: Ranks) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RankError, match="UserWarning: look out"):
            ranks.run(2, warn)
        warnings.simplefilter("ignore")
        ranks.run(2, warn)


def test_jobs_leave_nothing_behind(ranks: Ranks) -> None:
    first = ranks.run(4, use_model_parallel, 2)
    assert ranks.run(4, use_model_parallel, 2) == first
    assert all(was_clean and values[0] == 4.0 for _, was_clean, values in first)
    assert [groups for groups, *_ in ranks.run(4, use_model_parallel, 2)] == [g for g, *_ in first]


def test_what_ranks_started_ends_with_them() -> None:
    pools = Ranks()
    servers = [psutil.Process(pid) for pid in pools.run(2, start_a_server)]
    assert all(server.is_running() for server in servers)
    pools.close()
    _, alive = psutil.wait_procs(servers, timeout=60)
    assert not alive
