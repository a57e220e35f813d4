"""An exchange is one folder and one line in each of two registries: one added here trains through every door."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.dist.gpt import Case, Outcome, train
from tests.dist.gpt_parts import assemble
from tests.dist.training_runs import train as train_reference
from tests.ranks import Ranks

ROOT = Path(__file__).parents[2]
FLAGS = "--head-dim-parallel 2,2 --head-dim-exchange gathered"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with one folder and two lines more: what CONTRIBUTING tells to do, and nothing else."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "hp_plugin", root / "hp_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    exchange = root / "hp_plugin" / "exchange"
    shutil.copytree(ROOT / "tests" / "dist" / "gathered", exchange / "gathered")
    for registry, module, last in (("rules", "rule", "LocalRule()"), ("strategies", "strategy", "LocalExchange")):
        file = exchange / f"{registry}.py"
        before, found, after = file.read_text("utf-8").rpartition(f"{last})")
        assert found, f"{file} lists its exchanges otherwise"
        mine = "GatheredRule()" if module == "rule" else "GatheredExchange"
        line = f"from hp_plugin.exchange.gathered.{module} import {mine.removesuffix('()')}\n"
        before = before.replace("from hp_plugin.exchange.local.", line + "from hp_plugin.exchange.local.", 1)
        file.write_text(f"{before}{last}, {mine}){after}", "utf-8")
    return root


@pytest.fixture
def extended(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Ranks that import the copy."""
    monkeypatch.syspath_prepend(copy)
    pools = Ranks()
    yield pools
    pools.close()


def train_gathered(model: dict[str, object]) -> Outcome:
    import hp_plugin
    from hp_plugin.config import HeadDimConfig
    from hp_plugin.exchange.strategies import STRATEGIES

    assert Path(hp_plugin.__file__).parents[1] != ROOT and "gathered" in STRATEGIES
    return train(Case(tp=4, grid=HeadDimConfig(2, 2, "gathered"), model=model))


@pytest.mark.parametrize("model", [{}, {"qk_layernorm": True, "attention_output_gate": True}], ids=["plain", "norms"])
def test_it_gives_the_loss_and_the_gradients_of_one_stock_rank(
    ranks: Ranks, extended: Ranks, model: dict[str, object]
) -> None:
    (stock,) = ranks.run(1, train, Case(model=model))
    found = extended.run(4, train_gathered, model)
    for outcome in found:
        assert outcome.losses[0] == pytest.approx(stock.losses[0], rel=1e-6)
        assert outcome.losses == pytest.approx(stock.losses, rel=1e-4)
    expected, whole = assemble([stock.grads], 1), assemble([outcome.grads for outcome in found], 4)
    assert whole.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert (whole[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name


def test_the_reference_trainer_takes_it_by_its_flag(ranks: Ranks, extended: Ranks, tmp_path: Path) -> None:
    (stock, _), *_ = ranks.run(1, train_reference, str(tmp_path), "--train-iters 5")
    losses, _ = extended.run(4, train_reference, str(tmp_path), f"--train-iters 5 {FLAGS}")[-1]
    assert len(losses) == 5
    assert losses == pytest.approx(stock, abs=1e-4)
    assert torch.tensor(list(losses.values())).isfinite().all()


def in_copy(copy: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=copy, env={"PYTHONPATH": "."}, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_planner_predicts_it(copy: Path) -> None:
    code = (
        "from hp_plugin.planner.inputs.layout import Layout\n"
        "from hp_plugin.planner.inputs.model_shape import ModelShape\n"
        "from hp_plugin.planner.inputs.workload import Workload\n"
        "from hp_plugin.planner.machine.hardware import load_hardware\n"
        "from hp_plugin.planner.search.plan import make_plan\n"
        "plan = make_plan(ModelShape('m', 4, 1024, 8, 2, 128, 4096, 1024), 4, Workload('train', 512, 8),"
        " load_hardware('h100-ib'))\n"
        "found = {(p.layout.m, p.layout.n) for p in plan.found if p.layout.grid and"
        " p.layout.grid.exchange == 'gathered'}\n"
        "print(sorted(found))"
    )
    assert in_copy(copy, "-c", code) == "[(1, 2), (1, 4), (2, 2)]\n"


def test_the_house_stands_with_it(copy: Path) -> None:
    """Floors and names, as tests/pure holds them, in the copy."""
    for file in ("test_imports.py", "test_exchange_names.py", "conftest.py"):
        (copy / "tests" / "pure").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / "pure" / file, copy / "tests" / "pure")
    said = in_copy(
        copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "floor or below or names or upstream", "tests/pure"
    )
    assert " passed" in said and " failed" not in said
