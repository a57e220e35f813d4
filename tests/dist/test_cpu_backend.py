"""Stock Megatron-Core on the CPU backend: every layout trains the model that one rank trains."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from hp_plugin import cpu_backend
from tests.dist.gpt import Case, Outcome, train
from tests.dist.gpt_parts import assemble
from tests.ranks import Ranks

# Half the distance between neighbouring numbers at 1: what storing a value in the type can change, relatively.
ROUNDING = {torch.bfloat16: 2**-9, torch.float16: 2**-12}
CLIP = 1.0
ON_LINUX = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="scheduling policies are Linux's")
DROPOUTS = {"attention_dropout": 0.2, "hidden_dropout": 0.2}


@pytest.fixture
def new_ranks() -> Iterator[Ranks]:
    """Ranks that no other test has enabled the backend on."""
    pools = Ranks()
    yield pools
    pools.close()


@pytest.fixture(scope="module")
def reference(ranks: Ranks) -> Outcome:
    return ranks.run(1, train, Case(clip_grad=CLIP))[0]


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference over largest value, of the tensor where that is worst."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)


def grads(outcomes: list[Outcome], case: Case) -> dict[str, torch.Tensor]:
    return assemble([outcome.grads for outcome in outcomes], case.tp)


def params(outcomes: list[Outcome], case: Case) -> dict[str, torch.Tensor]:
    return assemble([outcome.params for outcome in outcomes], case.tp)


LAYOUTS = {
    "tp": (2, Case(tp=2)),
    "tp, sequence parallel": (2, Case(tp=2).but(sequence_parallel=True)),
    "dp": (2, Case()),
    "dp, overlap": (2, Case(overlap=True)),
    "tp x pp, 1f1b": (4, Case(tp=2, pp=2)),
    "tp x pp, 1f1b, sequence parallel": (4, Case(tp=2, pp=2).but(sequence_parallel=True)),
    "tp x pp, interleaved": (4, Case(tp=2, pp=2, vp=2)),
    "pp 4": (4, Case(pp=4)),
    "dp x tp": (4, Case(tp=2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_gradients_of_one_rank(ranks: Ranks, reference: Outcome, layout: str) -> None:
    world, case = LAYOUTS[layout]
    case = replace(case, clip_grad=CLIP)
    outcomes = ranks.run(world, train, case)
    assert difference(grads(outcomes, case), grads([reference], Case())) < 1e-5
    # Adam divides gradients by their own size, so that the last bits of the smallest ones count in full.
    assert difference(params(outcomes, case), params([reference], Case())) < 1e-4
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(reference.losses, rel=1e-6)
        assert outcome.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)


def test_clipping_scales_by_the_norm_of_the_whole_model(ranks: Ranks, reference: Outcome) -> None:
    norm = torch.stack([grad.pow(2).sum() for grad in grads([reference], Case()).values()]).sum().sqrt()
    assert reference.grad_norms[0] == pytest.approx(float(norm), rel=1e-5)
    assert float(norm) > CLIP, "nothing to clip"


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributed_optimizer_takes_the_same_steps(ranks: Ranks, dtype: torch.dtype, overlap: bool) -> None:
    plain = Case(tp=2, dtype=dtype, clip_grad=CLIP, steps=3)
    sharded = replace(plain, distributed_optimizer=True, overlap=overlap)
    expected, found = ranks.run(4, train, plain), ranks.run(4, train, sharded)
    assert found[0].losses == pytest.approx(expected[0].losses, rel=1e-6 if dtype is torch.float32 else 2**-9)
    assert found[0].grad_norms == pytest.approx(expected[0].grad_norms, rel=1e-5 if dtype is torch.float32 else 2**-9)
    bound = 1e-5 if dtype is torch.float32 else 2**-8
    assert difference(params(found, sharded), params(expected, plain)) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["tp", "tp, sequence parallel", "tp x pp, interleaved"])
def test_half_precision_trains_near_single(ranks: Ranks, reference: Outcome, dtype: torch.dtype, layout: str) -> None:
    world, like = LAYOUTS[layout]
    case = replace(like, dtype=dtype, clip_grad=CLIP, loss_scale=1024.0)
    outcome = ranks.run(world, train, case)[0]
    assert outcome.skipped == [False, False]
    # A loss is an average, so rounding every value on its way moves it by less than two roundings of itself.
    assert outcome.losses == pytest.approx(reference.losses, rel=2 * ROUNDING[dtype])
    # A gradient goes back through as many layers again; after one step of Adam the weights are others.
    assert outcome.grad_norms[0] == pytest.approx(reference.grad_norms[0], rel=4 * ROUNDING[dtype])


def test_overflow_in_fp16_skips_the_step_and_halves_the_scale(ranks: Ranks) -> None:
    case = Case(tp=2, dtype=torch.float16, loss_scale=2.0**40, clip_grad=CLIP)
    outcomes = ranks.run(2, train, case)
    assert [outcome.skipped for outcome in outcomes] == [[True, True]] * 2
    assert [outcome.loss_scales for outcome in outcomes] == [[2.0**39, 2.0**38]] * 2
    start = ranks.run(2, train, Case(tp=2, dtype=torch.float16, steps=0))
    assert difference(params(outcomes, case), params(start, case)) == 0.0


def test_zeros_in_gradients_are_counted_once(ranks: Ranks) -> None:
    one = ranks.run(1, train, Case(tied=False))[0]
    assert one.zeros[0] >= 8 * 32, "the embeddings of tokens that never occur"
    for case in (Case(tp=2, tied=False), Case(tp=2, pp=2, tied=False)):
        assert ranks.run(case.tp * case.pp, train, case)[0].zeros == one.zeros


RECOMPUTE = {
    "full, uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "full, block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "full, activations spread over the TP group": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "distribute_saved_activations": True,
    },
    "selective": {"recompute_granularity": "selective"},
    "selective, layernorm and mlp": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "layernorm", "mlp"],
        # Megatron's checkpoint of an MLP without Transformer Engine never returns if there is a bias to return.
        "add_bias_linear": False,
    },
}


@pytest.mark.parametrize("how", RECOMPUTE)
def test_recompute_repeats_the_dropouts(ranks: Ranks, how: str) -> None:
    recompute = RECOMPUTE[how]
    plain = Case(tp=2, layers=2).but(add_bias_linear=recompute.get("add_bias_linear", True))
    stored = plain.but(**DROPOUTS)
    recomputed = stored.but(**recompute)
    expected, found = ranks.run(2, train, stored), ranks.run(2, train, recomputed)
    assert expected[0].losses != ranks.run(2, train, plain)[0].losses, "no dropout happened"
    assert found[0].losses == expected[0].losses
    assert difference(grads(found, recomputed), grads(expected, stored)) == 0.0


def record_dropouts(case: Case) -> list[tuple[int, torch.Tensor]]:
    """Train, and return for every dropout call of the first step its rank of input and where it dropped."""
    cpu_backend.enable()
    dropped = []
    original = torch.nn.functional.dropout

    def dropout(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        mask = original(torch.ones_like(x), *args, **kwargs)
        dropped.append((x.dim(), mask == 0))
        return x * mask

    torch.nn.functional.dropout = dropout
    try:
        train(case)
    finally:
        torch.nn.functional.dropout = original
    return dropped


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_masks_differ_where_tensors_do(ranks: Ranks, sequence_parallel: bool) -> None:
    case = Case(tp=2, layers=2, steps=1).but(**DROPOUTS, sequence_parallel=sequence_parallel)
    ours, theirs = ranks.run(2, record_dropouts, case)
    assert len(ours) == len(theirs) == 4 * (1 + 2 * 3), "embedding; attention, projection and MLP of two layers"
    for (axes, mine), (_, other) in zip(ours, theirs, strict=True):
        # Scores are [b, heads of this rank, s, s]; hidden states are whole, or this rank's tokens.
        agree = axes == 3 and not sequence_parallel
        assert torch.equal(mine, other) == agree
        assert 0.05 < mine.float().mean() < 0.4


def fork_twice() -> tuple[list[float], list[float], list[str]]:
    cpu_backend.enable()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron.core").addHandler(handler)
    try:
        model_parallel_cuda_manual_seed(7)
        default, forked = [torch.rand(1).item()], []
        for _ in range(2):
            with get_cuda_rng_tracker().fork():
                forked.append(torch.rand(1).item())
            default.append(torch.rand(1).item())
    finally:
        logging.getLogger("megatron.core").removeHandler(handler)
    return default, forked, said


def test_forked_generators_go_on_where_they_were(ranks: Ranks) -> None:
    (default, forked, said), (other_default, other_forked, _) = ranks.run(2, fork_twice)
    assert default == other_default == torch.rand(3, generator=torch.Generator().manual_seed(7)).tolist()
    for rank, values in enumerate([forked, other_forked]):
        stream = torch.Generator().manual_seed(7 + 2718 + rank)
        assert values == [torch.rand(1, generator=stream).item() for _ in range(2)]
    assert said == []


def load_on_first_rank() -> tuple[list[int], list[int], float]:
    cpu_backend.enable()
    torch.cuda.manual_seed(3)
    epochs: list[list[int]] = [[], []]
    if dist.get_rank() == 0:
        loader = torch.utils.data.DataLoader(range(100), shuffle=True)
        epochs = [[int(x) for x in loader] for _ in range(2)]
    return epochs[0], epochs[1], torch.rand(1).item()


def test_a_loader_on_one_rank_leaves_the_generators_together(ranks: Ranks) -> None:
    (first, second, mine), (*_, other) = ranks.run(2, load_on_first_rank)
    assert mine == other
    assert sorted(first) == sorted(second) == list(range(100)) and first != second


def send_and_free(numel: int) -> bool:
    cpu_backend.enable()
    if dist.get_rank() == 1:
        time.sleep(0.5)  # the sender has reused the memory by then
        received = torch.empty(numel)
        dist.recv(received, 0)
        return bool((received == 1).all())
    sent = torch.ones(numel)
    handle = dist.isend(sent, 1)
    sent.data = torch.empty(1)
    garbage = [torch.full((numel,), 2.0) for _ in range(4)]
    handle.wait()
    return len(garbage) == 4


def test_memory_freed_during_a_send_is_sent_as_it_was(ranks: Ranks) -> None:
    # Far more than a socket buffers; small enough that the allocator gives the same memory out again.
    assert ranks.run(2, send_and_free, 6_000_000) == [True, True]


def redirect() -> None:
    cpu_backend.enable()
    check_devices()
    with ThreadPoolExecutor(1) as pool:  # as in backward passes, where a context of this thread would be missing
        pool.submit(check_devices).result()


def check_devices() -> None:
    for device in ("cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0)):
        assert torch.zeros(2, device=device, pin_memory=True).device.type == "cpu"
        assert torch.empty_like(torch.ones(2), device=device).device.type == "cpu"
        assert torch.ones(2).new_zeros(2, device=device).device.type == "cpu"
        assert torch.ones(2).to(device).device.type == torch.ones(2).to(device=device).device.type == "cpu"
    kept = torch.ones(2)
    assert kept.cuda() is kept and kept.cuda(torch.cuda.current_device(), non_blocking=True) is kept
    assert kept.to("cuda", torch.float16).dtype == torch.float16 and kept.to(torch.zeros(1).half()).dtype == torch.half
    assert torch.ones(2, device="meta").device.type == "meta" and kept.to("meta").device.type == "meta"
    assert kept.type() == "torch.cuda.FloatTensor" and kept.type("torch.cuda.HalfTensor").dtype == torch.half
    assert kept.type(torch.int32).dtype == torch.int32
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"


def use_streams() -> None:
    cpu_backend.enable()
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
    stream, start, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event(True)
    with torch.cuda.stream(stream):
        start.record()
        time.sleep(0.02)
        stream.record_event(end)
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.default_stream().wait_event(end)
    torch.cuda.synchronize()
    assert 15 < start.elapsed_time(end) < 5000 and end.query() and stream.query()
    torch.cuda.nvtx.range_push("x")
    torch.cuda.nvtx.range_pop()
    assert torch.cuda.memory_stats()["allocation.all.current"] == 0 == torch.cuda.memory_allocated()
    assert torch.cuda.is_current_stream_capturing() is False
    with pytest.raises(RuntimeError, match="must be recorded"):
        torch.cuda.Event().elapsed_time(end)


def run_compiled() -> None:
    cpu_backend.enable()
    seen = []

    @torch.compile
    def double(x: torch.Tensor) -> torch.Tensor:
        seen.append(type(x))
        return 2 * x

    assert double(torch.ones(1)).item() == 2.0
    assert seen == [torch.Tensor]
    assert not torch._dynamo.utils.counters["frames"], "something was compiled"


@pytest.mark.parametrize("body", [redirect, use_streams, run_compiled])
def test_calls_upstream_makes(ranks: Ranks, body: object) -> None:
    ranks.run(1, body)


IMPORT = """
import sys, torch, torch.cuda.nvtx, torch.distributed, torch.utils.data
places = [torch, torch.Tensor, torch.cuda, torch.cuda.nvtx, torch.distributed, torch.distributed.distributed_c10d,
          torch.utils.data.DataLoader]
before = [dict(vars(place)) for place in places]
import hp_plugin.cpu_backend as backend
changed = [(place, name) for place, old in zip(places, before)
           for name in old.keys() | vars(place).keys() if vars(place).get(name) is not old.get(name)]
print(changed, backend.is_enabled(), "megatron.core" in sys.modules)
"""


def test_import_changes_nothing() -> None:
    said = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "[] False False"


def still_off() -> bool:
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.zeros(1, device="cuda")
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    return not cpu_backend.is_enabled() and torch.ones(1).type() == "torch.FloatTensor"


def enable_where_cuda_is() -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 3
    with pytest.raises(RuntimeError, match=r"torch sees 3 CUDA device.*CUDA_VISIBLE_DEVICES"):
        cpu_backend.enable()
    assert still_off()


def enable_on_changed_signature() -> None:
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda state, where: None
    with pytest.raises(
        RuntimeError,
        match=r"megatron-core 0\.16\.1, where it knows \(new_state, device, graph_safe\); .* \(state, where\)",
    ):
        cpu_backend.enable()
    assert still_off()


def enable_on_changed_source() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def fork(self: object, name: str = "") -> None:
        return None

    CudaRNGStatesTracker.fork = fork
    with pytest.raises(
        RuntimeError, match=r"fork as of .*, where it knows the line 'CPU RNG state .* has no such line"
    ):
        cpu_backend.enable()
    assert still_off()


def enable_without_function() -> None:
    del torch.cuda.current_device
    with pytest.raises(RuntimeError, match=r"torch.cuda.current_device as of torch 2.13.0, .* has None"):
        cpu_backend.enable()
    assert still_off()


def enable_twice() -> None:
    assert still_off()
    cpu_backend.enable()
    once = torch.zeros
    cpu_backend.enable()
    assert cpu_backend.is_enabled() and torch.zeros is once


def enable_on_shared_cores() -> None:
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    cpu_backend.enable()
    assert os.sched_getscheduler(0) == os.SCHED_BATCH


@pytest.mark.parametrize(
    "body",
    [
        enable_where_cuda_is,
        enable_on_changed_signature,
        enable_on_changed_source,
        enable_without_function,
        enable_twice,
        pytest.param(enable_on_shared_cores, marks=ON_LINUX),
    ],
)
def test_enable(new_ranks: Ranks, body: object) -> None:
    new_ranks.run(1, body)


def test_no_compiler_is_loaded() -> None:
    # Ranks of tests have it: their server loads Megatron-Core as it is.
    script = """
import sys
import torch
from hp_plugin import cpu_backend
cpu_backend.enable()
assert "megatron.core.jit" in sys.modules and torch.compile(abs) is abs
assert "torch._inductor.compile_fx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
