"""The house's floors: who may import whom, and what may be imported at all."""

import ast
import graphlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hp_plugin"
# A folder with a rule is an exchange; a further one has its places already.
EXCHANGES = sorted(path.parent.name for path in (PACKAGE / "exchange").glob("*/rule.py"))

# The house, from the bottom: rooms that stand on one floor, each a step above those before it in the list. A room is a
# folder or a module; a longer name is a room of its own in the shorter one. Rooms of one step do not see each other.
FLOORS: dict[int, list[tuple[str, ...]]] = {
    0: [
        ("refusal", "processes", "processes.lifetime", "processes.interrupts"),
        ("processes.rank", "grid", "exchange", *(f"exchange.{name}" for name in EXCHANGES)),
        ("grid.ranks", "grid.ownership", "exchange.sizes"),
        ("exchange.rule",),
        tuple(f"exchange.{name}.rule" for name in EXCHANGES),
        ("exchange.rules",),
        ("exchange.advice",),
        ("config",),
        ("planner.machine",),
        ("planner.inputs",),
        ("planner.counts",),
        ("planner.seconds",),
        ("planner.search",),
        ("planner.reports",),
        ("planner",),
    ],
    2: [
        ("upstream", "processes.refusals"),
        (
            *("grid.groups", "cpu_backend", "shared_gpus", "exchange.masks", "exchange.dropout_rng"),
            *("exchange.kv_cache", "exchange.replicas"),
        ),
        ("exchange.shapes",),
        ("exchange.strategy", "exchange.fused_kernels"),
        tuple(f"exchange.{name}." for name in EXCHANGES if name != "weights"),
        ("exchange.weights.",),  # whose shares attend as those of `batch` and `sequence` do
        ("exchange.strategies", "checkpoint"),
    ],
    3: [("attention",)],
    4: [("megatron_lm", "deepspeed_adapter")],
    5: [("training", "launch"), ("generation",)],
    6: [("bench", "compare.entries"), ("compare.ranks",), ("compare.rates",), ("compare.report",), ("compare",)],
    7: [("commands",), ("megatron_adapter", "cost")],
}
PLACES = {
    f"hp_plugin.{room}": (floor, step)
    for floor, steps in FLOORS.items()
    for step, rooms in enumerate(steps)
    for room in rooms
}
# Names of the package root are loaded on first use.
PLACES["hp_plugin"] = (0, -1)
# What floor 0 takes from elsewhere, and only when it is asked for: pictures, and defaults of Hugging Face's models, for
# which a table stands in.
LAZY_ON_FLOOR_0 = {"matplotlib", "transformers"}
# Read, because launchers set them, and torch's switches for reading and compiling, which are set; no option is an
# environment variable.
LAUNCHER_VARIABLES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"),
    *("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCHDYNAMO_DISABLE"),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def home(module: str) -> str:
    """The room that a module stands in: the longest entry of PLACES that is the module or around it."""
    name = module
    while name not in PLACES:
        name = name.rpartition(".")[0]
        if f"{name}." in PLACES:  # a folder whose pure parts have places of their own
            return f"{name}."
    return name


def imports(module: str) -> Iterator[tuple[str, bool, int]]:
    """Everything a module imports anywhere in it: full name, whether it is lazy, line."""
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in top, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module), id(node) not in top, node.lineno


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_below_it(module: str) -> None:
    if module == "hp_plugin":
        pytest.skip("names what it loads on first use")
    assert home(module) != "hp_plugin", f"{module} has no place in PLACES yet: give it a floor"
    for imported, _, line in imports(module):
        if imported.split(".")[0] != "hp_plugin" or home(imported) == home(module):
            continue
        assert PLACES[home(imported)] < PLACES[home(module)], f"{module}:{line} imports {imported}, not below it"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {name for name, _, _ in imports(module) if name in MODULES and name != "hp_plugin"}
        for module in MODULES
        if module != "hp_plugin"
    }
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_upstream_is_imported_only_where_it_belongs(module: str) -> None:
    floor = PLACES[home(module)][0]
    for imported, lazy, line in imports(module):
        top = imported.split(".")[0]
        where = f"{module}:{line} imports {imported}"
        if floor == 0:
            known = top in sys.stdlib_module_names or top == "hp_plugin" or (lazy and top in LAZY_ON_FLOOR_0)
            assert known, f"{where} on the floor of the standard library"
        if top == "deepspeed":
            assert module.startswith("hp_plugin.deepspeed_adapter"), where


@pytest.mark.parametrize("module", MODULES)
def test_no_option_is_an_environment_variable(module: str) -> None:
    text = MODULES[module].read_text("utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            line = text.splitlines()[node.lineno - 1]
            assert any(f'"{name}"' in line for name in LAUNCHER_VARIABLES), f"{module}:{node.lineno}: {line.strip()}"


def run_python(code: str) -> str:
    """What a fresh interpreter prints for `code`; fails with its stderr if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_floor_0_and_the_command_line_run_without_torch() -> None:
    modules = [name for name in MODULES if PLACES[home(name)][0] == 0] + [
        "hp_plugin.commands.main",
        "hp_plugin.commands.doctor",
    ]
    run_python(
        "import importlib, sys\n"
        "for name in ('torch', 'numpy', 'megatron', 'deepspeed', 'matplotlib', 'packaging'): sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )


def test_importing_the_package_loads_no_framework() -> None:
    loaded = json.loads(run_python("import json, sys, hp_plugin; print(json.dumps(sorted(sys.modules)))"))
    assert "hp_plugin" in loaded
    assert not {"torch", "numpy", "megatron.core", "deepspeed"} & set(loaded)


def test_the_tests_of_the_standard_library_floor_are_collected_without_upstream() -> None:
    # tests/pure/conftest.py holds it while they run.
    blocked = ("torch", "numpy", "megatron", "deepspeed", "transformer_engine", "matplotlib")
    collected = run_python(
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import pytest\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', 'tests/pure']))"
    )
    assert "test_imports.py::test_the_tests_of_the_standard_library_floor" in collected


@pytest.mark.parametrize("name", ["torch", "torch.distributed", "numpy", "megatron.core", "deepspeed", "matplotlib"])
def test_a_test_of_this_folder_can_import_no_upstream_library(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="not for tests/pure"):
        importlib.import_module(name)


def test_no_directory_shadows_upstream() -> None:
    # A folder of this name with an __init__.py, on sys.path, hides the namespace package `megatron`.
    ours = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    names = {child.name for top in ours for child in [top, *top.rglob("*")] if child.is_dir()}
    assert names.isdisjoint({"megatron", "deepspeed"})
    assert "hp_plugin" in names


def test_no_module_is_a_drawer_for_everything() -> None:
    assert not [name for name in MODULES if name.endswith((".utils", ".helpers", ".common", ".misc"))]
