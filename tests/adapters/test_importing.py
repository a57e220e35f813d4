"""Importing our modules beside the upstream libraries: every public name is there, and nothing else changes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints for `code`; fails with its stderr if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there() -> None:
    output = run_python(
        "import warnings; warnings.simplefilter('ignore')\n"
        "import hp_plugin\n"
        "for name in hp_plugin.__all__: print(name, getattr(hp_plugin, name).__name__)\n"
    )
    lines = [line.split() for line in output.splitlines()]
    assert lines and all(public == own for public, own in lines)


# Takes stock of everything an import could change behind the caller's back, imports every module of ours, and compares.
# Upstream is imported first: what it changes by itself is not ours.
STOCKTAKING = """
import importlib, json, logging, os, random, signal, sys, threading, warnings
warnings.simplefilter("ignore")
import numpy, torch, torch.distributed
import megatron.core.parallel_state as parallel_state
import megatron.core.models.gpt, megatron.core.models.gpt.gpt_layer_specs, megatron.core.optimizer
import megatron.core.distributed, megatron.core.pipeline_parallel, megatron.core.tensor_parallel.random
import megatron.core.datasets.gpt_dataset, megatron.core.datasets.blended_megatron_dataset_builder
from megatron.core.transformer.transformer_config import TransformerConfig

patched = [torch, torch.Tensor, torch.cuda, torch.distributed, torch.nn.Module, torch.autograd, parallel_state]
patched += [TransformerConfig] + [m for n, m in sorted(sys.modules.items()) if n.startswith("megatron.core") and m]

def stock():
    return {
        "environment": dict(os.environ),
        "sys.path": list(sys.path),
        "working directory": os.getcwd(),
        "warning filters": [repr(f) for f in warnings.filters],
        "root logger": (logging.root.level, len(logging.root.handlers)),
        "signal handlers": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "threads": threading.active_count(),
        "excepthook": id(sys.excepthook),
        "generators": (repr(random.getstate()), repr(numpy.random.get_state()), torch.get_rng_state().tolist()),
        "torch": (str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled()),
        "distributed": torch.distributed.is_initialized(),
    }

before, names = stock(), [dict(vars(owner)) for owner in patched]
for module in json.loads(sys.argv[1]):
    importlib.import_module(module)
changed = [key for key, value in stock().items() if value != before[key]]
for owner, old in zip(patched, names):
    new = vars(owner)
    changed += [f"{owner.__name__}.{name}" for name, value in old.items() if new.get(name) is not value]
print(json.dumps(changed))
"""


def test_importing_any_module_changes_nothing_else() -> None:
    # DeepSpeed sets things up when it is imported, and is imported only by its adapter.
    files = sorted((ROOT / "hp_plugin").rglob("*.py"))
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    ours = [name for name in modules if not name.startswith("hp_plugin.deepspeed_adapter")]
    printed = run_python(STOCKTAKING, json.dumps(ours))
    assert printed.count("\n") == 1, f"importing printed: {printed}"
    assert json.loads(printed) == []
