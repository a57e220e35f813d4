"""Collectives by way of host memory are the collectives: every method, handle and coalescing, and a whole training.

There is no GPU here: what counts as on a device is what the test says, and gloo must never be handed it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hp_plugin.config import HeadDimConfig
from hp_plugin.shared_gpus.placing import described, device_index, use_gpu
from hp_plugin.shared_gpus.staging import METHODS, Staging
from hp_plugin.training.distributed import backend_of
from tests.dist import gpt
from tests.dist.gpt import Case
from tests.dist.training_runs import configured
from tests.ranks import Ranks

SIZE = 3
Collective = Callable[[bool], list[Tensor]]


def made(*shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    """Another tensor on every rank."""
    generator = torch.Generator().manual_seed(17 * dist.get_rank() + offset)
    return torch.randn(shape, generator=generator).to(dtype)


def finished(handle: Any, asynchronous: bool) -> None:
    if asynchronous:
        assert handle.wait()
    else:
        assert handle is None


def all_reduce(asynchronous: bool) -> list[Tensor]:
    tensors = [made(5, 2), made(4, 6, dtype=torch.bfloat16), made(7).double()]
    for tensor, op in zip(tensors, (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN), strict=True):
        finished(dist.all_reduce(tensor, op, async_op=asynchronous), asynchronous)
    whole = made(6, 4)
    finished(dist.all_reduce(whole[2:4], async_op=asynchronous), asynchronous)  # a part of a larger one
    return [*tensors, whole]


def broadcast(asynchronous: bool) -> list[Tensor]:
    parameter = torch.nn.Parameter(made(3, 3))
    finished(dist.broadcast(parameter.data, src=1, async_op=asynchronous), asynchronous)
    return [parameter.detach()]


def reduce(asynchronous: bool) -> list[Tensor]:
    tensor = made(5)
    finished(dist.reduce(tensor, dst=2, async_op=asynchronous), asynchronous)
    return [tensor] if dist.get_rank() == 2 else []


def gathers(asynchronous: bool) -> list[Tensor]:
    flat, listed = torch.zeros(SIZE * 4, 3), [torch.zeros(4, 3) for _ in range(SIZE)]
    finished(dist.all_gather_into_tensor(flat, made(4, 3), async_op=asynchronous), asynchronous)
    finished(dist.all_gather(listed, made(4, 3), async_op=asynchronous), asynchronous)
    into = [torch.zeros(2) for _ in range(SIZE)] if dist.get_rank() == 0 else None
    finished(dist.gather(made(2), into, dst=0, async_op=asynchronous), asynchronous)
    return [flat, *listed, *(into or [])]


def scatters(asynchronous: bool) -> list[Tensor]:
    own, summed = torch.zeros(4), torch.zeros(2, 3)
    parts = [made(4, offset=number) for number in range(SIZE)] if dist.get_rank() == 0 else None
    finished(dist.scatter(own, parts, src=0, async_op=asynchronous), asynchronous)
    finished(dist.reduce_scatter_tensor(summed, made(SIZE * 2, 3), async_op=asynchronous), asynchronous)
    return [own, summed]


def all_to_all(asynchronous: bool) -> list[Tensor]:
    rank = dist.get_rank()
    even = torch.zeros(SIZE * 2, 2)
    finished(dist.all_to_all_single(even, made(SIZE * 2, 2), async_op=asynchronous), asynchronous)
    sent = [[1, 2, 0], [3, 1, 1], [0, 2, 2]]
    received = [row[rank] for row in sent]
    uneven = torch.zeros(sum(received), 2)
    work = dist.all_to_all_single(uneven, made(sum(sent[rank]), 2), received, sent[rank], async_op=asynchronous)
    finished(work, asynchronous)
    return [even, uneven]


def messages(asynchronous: bool) -> list[Tensor]:
    rank = dist.get_rank()
    onwards, back = (rank + 1) % SIZE, (rank - 1) % SIZE
    first, second = torch.zeros(3, 2), torch.zeros(4)
    if asynchronous:
        handles = [dist.isend(made(3, 2), onwards), dist.irecv(first, back)]
        ops = [dist.P2POp(dist.isend, made(4), back), dist.P2POp(dist.irecv, second, onwards)]
        for handle in (*handles, *dist.batch_isend_irecv(ops)):
            handle.wait()
    else:
        for turn in range(SIZE):
            if turn == rank:
                dist.send(made(3, 2), onwards)
            if turn == back:
                dist.recv(first, back)
    return [first, second]


def coalesced(asynchronous: bool) -> list[Tensor]:
    """As Megatron-Core reduces gradients."""
    tensors, gathered = [made(3), made(2, 2)], [torch.zeros(SIZE * 2), torch.zeros(SIZE)]
    with dist.distributed_c10d._coalescing_manager(dist.group.WORLD, async_ops=asynchronous) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor, async_op=asynchronous)
    if asynchronous:
        manager.wait()
    with dist.distributed_c10d._coalescing_manager(dist.group.WORLD, async_ops=asynchronous) as manager:
        for whole in gathered:
            dist.all_gather_into_tensor(whole, made(len(whole) // SIZE), async_op=asynchronous)
    if asynchronous:
        manager.wait()
    return [*tensors, *gathered]


def objects(asynchronous: bool) -> list[Tensor]:
    everyone: list[Any] = [None] * SIZE
    dist.all_gather_object(everyone, {"rank": dist.get_rank(), "value": made(2)})
    dist.barrier()
    return [one["value"] for one in everyone]


COLLECTIVES = [all_reduce, broadcast, reduce, gathers, scatters, all_to_all, messages, coalesced, objects]


def both_ways(collective: Collective, asynchronous: bool) -> tuple[list[Tensor], list[Tensor], int]:
    """Results without and with staging, and how many calls reached gloo with tensors that it was not to see."""
    plain = collective(asynchronous)
    seen: dict[int, Tensor] = {}
    wrong = 0

    def remember(tensor: Tensor) -> bool:
        seen[tensor.data_ptr()] = tensor  # kept, lest its memory become a copy's
        return True

    def watched(original: Any) -> Any:
        @wraps(original)
        def call(group: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal wrong
            wrong += sum(pointer in seen for pointer in pointers(arguments[:2]))
            return original(group, *arguments, **options)

        return call

    originals = {name: vars(dist.ProcessGroup)[name] for name in METHODS if name in vars(dist.ProcessGroup)}
    for name in originals:
        setattr(dist.ProcessGroup, name, watched(getattr(dist.ProcessGroup, name)))
    staging = Staging(remember)
    staging.install()
    try:
        return plain, collective(asynchronous), wrong
    finally:
        staging.remove()
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)


def pointers(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        return [value.data_ptr()]
    return [one for part in value for one in pointers(part)] if isinstance(value, (list, tuple)) else []


def alike(name: str, asynchronous: bool) -> tuple[bool, int, int]:
    collective = next(one for one in COLLECTIVES if one.__name__ == name)
    plain, staged, wrong = both_ways(collective, asynchronous)
    same = all(torch.equal(one, other) for one, other in zip(plain, staged, strict=True))
    return same, len(plain), wrong


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waited for", "handles"])
@pytest.mark.parametrize("collective", COLLECTIVES, ids=lambda one: one.__name__)
def test_a_staged_collective_is_the_collective(ranks: Ranks, collective: Collective, asynchronous: bool) -> None:
    found = ranks.run(SIZE, alike, collective.__name__, asynchronous)
    assert all(same and wrong == 0 for same, _, wrong in found) and max(count for _, count, _ in found) > 0


def results_before_waiting() -> tuple[bool, bool, bool, str]:
    staging = Staging(lambda tensor: True)
    staging.install()
    try:
        tensor = made(4)
        before = tensor.clone()
        work = dist.all_reduce(tensor, async_op=True)
        while not work._work.is_completed():
            pass
        untouched = torch.equal(tensor, before)
        done = work.is_completed()
        arrived = not torch.equal(tensor, before)
        try:
            work.get_future()
        except AttributeError as refused:
            return untouched, done, arrived, str(refused)
        return untouched, done, arrived, ""
    finally:
        staging.remove()


def test_results_arrive_with_the_handle_alone(ranks: Ranks) -> None:
    for untouched, done, arrived, refused in ranks.run(2, results_before_waiting):
        assert untouched and done and arrived and "no get_future: wait for them" in refused


def gathered_flat() -> bool:
    """As DeepSpeed's `gather_tokens` calls it, which NCCL takes and gloo by itself does not."""
    whole, shaped = torch.zeros(SIZE * 6), torch.zeros(SIZE * 2, 3)
    dist.all_gather_into_tensor(shaped, made(2, 3))
    staging = Staging(lambda tensor: True)
    staging.install()
    try:
        dist.all_gather_into_tensor(whole, made(2, 3))
    finally:
        staging.remove()
    return torch.equal(whole.view(-1, 3), shaped)


def test_a_gather_may_be_flat(ranks: Ranks) -> None:
    assert ranks.run(SIZE, gathered_flat) == [True] * SIZE


def left_alone() -> bool:
    staging = Staging(lambda tensor: tensor.is_cuda)
    before = vars(dist.ProcessGroup)["allreduce"]
    staging.install()
    staging.install()
    work = dist.all_reduce(made(2), async_op=True)
    work.wait()
    staging.remove()
    return isinstance(work, dist.Work) and vars(dist.ProcessGroup)["allreduce"] is before


def test_tensors_on_the_host_go_as_they_are(ranks: Ranks) -> None:
    assert ranks.run(1, left_alone) == [True]


def trained(case: Case) -> tuple[list[float], list[float]]:
    outcome = gpt.train(case)
    return outcome.losses, [float(tensor.sum()) for tensor, _, _ in outcome.params.values()]


def trained_staged(case: Case) -> tuple[list[float], list[float]]:
    staging = Staging(lambda tensor: True)
    staging.install()
    try:
        return trained(case)
    finally:
        staging.remove()


@pytest.mark.parametrize(
    "case",
    [
        Case(tp=4, grid=HeadDimConfig(2, 2, "batch"), layers=2, model={"sequence_parallel": True}),
        Case(tp=2, pp=2, grid=HeadDimConfig(1, 2, "sequence"), layers=2),
        Case(tp=2, grid=HeadDimConfig(1, 2, "scores"), layers=2, overlap=True, distributed_optimizer=True),
        Case(tp=4, grid=HeadDimConfig(2, 2, "weights"), layers=2),
    ],
    ids=["batch and SP", "sequence and PP", "scores, distributed optimizer, overlapped", "weights"],
)
def test_a_training_is_the_same_to_the_last_bit(ranks: Ranks, case: Case) -> None:
    assert ranks.run(4, trained_staged, case) == ranks.run(4, trained, case)


# --- which rank has which GPU ---------------------------------------------------------------------------------------


def test_ranks_have_the_gpus_in_turn() -> None:
    assert [device_index(rank, 6, 4, "gloo") for rank in range(6)] == [0, 1, 2, 3, 0, 1]
    assert [device_index(rank, 4, 4, "nccl") for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="4 ranks on 1 GPU: NCCL takes a GPU for one rank; --distributed-backend gloo"):
        device_index(0, 4, 1, "nccl")


def on_two_gpus(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> mock.Mock:
    for name, value in (("LOCAL_RANK", rank), ("RANK", rank), ("LOCAL_WORLD_SIZE", ranks)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card X")
    monkeypatch.setattr(torch.cuda, "set_device", chosen := mock.Mock())
    return chosen


@pytest.mark.parametrize(("rank", "says"), [(0, True), (3, False)])
def test_over_gloo_a_rank_takes_its_gpu_stages_and_one_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, says: bool
) -> None:
    chosen = on_two_gpus(monkeypatch, rank, 4)
    with mock.patch("hp_plugin.shared_gpus.placing._STAGING") as staging:
        assert use_gpu("gloo") == torch.device("cuda", rank % 2)
    chosen.assert_called_once_with(torch.device("cuda", rank % 2))
    staging.install.assert_called_once_with()
    assert capsys.readouterr().out == (described(4, 2, "Card X") + "\n" if says else "")
    assert "4 ranks in turn on 2 × Card X over gloo" in described(4, 2, "Card X")


def test_over_nccl_nothing_is_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    on_two_gpus(monkeypatch, 1, 2)
    with mock.patch("hp_plugin.shared_gpus.placing._STAGING") as staging:
        assert use_gpu("nccl") == torch.device("cuda", 1)
    staging.install.assert_not_called()


def test_the_trainers_flag_chooses_the_backend(tmp_path: Any) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    plain, gloo = configured(str(tmp_path), ""), configured(str(tmp_path), "--distributed-backend gloo")
    assert [backend_of(plain, cuda), backend_of(plain, cpu)] == ["nccl", "gloo"]
    assert [backend_of(gloo, cuda), backend_of(gloo, cpu)] == ["gloo", "gloo"]


def test_the_launcher_gives_megatron_lm_a_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from hp_plugin import launch

    on_two_gpus(monkeypatch, 3, 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with mock.patch("hp_plugin.shared_gpus.placing._STAGING") as staging:
        assert launch._enable_cpu(megatron_experts=True) is False
    import os

    assert os.environ["LOCAL_RANK"] == "1"
    staging.install.assert_called_once_with()


# --- without Transformer Engine -------------------------------------------------------------------------------------


def mended() -> tuple[bool, bool, list[str]]:
    """Whether the router's linear knows that there is no such product, before and after; and what was replaced."""
    from megatron.core.transformer.moe import moe_utils

    from hp_plugin import cpu_backend

    before = hasattr(moe_utils, "te_general_gemm")
    cpu_backend.mend_missing_packages()
    cpu_backend.mend_missing_packages()
    return before, hasattr(moe_utils, "te_general_gemm"), [hook.name for hook in cpu_backend.PACKAGE_HOOKS]


def test_a_machine_with_cuda_is_mended_where_transformer_engine_is_missing() -> None:
    pools = Ranks()  # of their own: nothing there has enabled the CPU backend
    try:
        assert pools.run(1, mended) == [(False, True, ["__init__", "router_gating_linear"])]
    finally:
        pools.close()
