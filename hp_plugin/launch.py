"""Runs an unmodified Megatron-LM script with the plugin's flags.

torchrun ... -m hp_plugin.launch pretrain_gpt.py <its usual flags> --head-dim-parallel 4,4

`--moe-backend deepspeed` puts DeepSpeed-MoE in the place of Megatron's mixtures of experts.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from hp_plugin.processes.interrupts import say_on_interrupt
from hp_plugin.processes.rank import begin_rank
from hp_plugin.processes.refusals import refuse

USAGE = "usage: torchrun ... -m hp_plugin.launch SCRIPT [flags of SCRIPT] [--head-dim-parallel M,N]"


def main(words: Sequence[str]) -> None:
    """Runs the script `words[0]` with the arguments after it, as `python` itself would.

    Raises:
        SystemExit: status 2 with a line that says why, if there is no such script or the plugin does not fit it.
    """
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, file=sys.stderr)
        raise SystemExit(0 if words else 2)
    script = Path(words[0])
    if not script.is_file():
        _refuse(f"{script} is no file (the current directory is {Path.cwd()})")
    sys.argv = list(words)
    _put_first(str(script.resolve().parent))
    # Everything that imports Megatron must come after this, to find the script's own and not an installed one.
    from hp_plugin.deepspeed_adapter.moe.megatron_lm import take_backend, use_deepspeed_moe
    from hp_plugin.megatron_lm.hooks import install

    try:
        sys.argv[1:], backend = take_backend(words[1:])
    except ValueError as mistake:
        _refuse(str(mistake))
    on_cpu = False
    try:
        if on_gloo(words[1:]):
            on_cpu = _enable_cpu(megatron_experts=backend == "megatron")
        install()
        if backend == "deepspeed":
            use_deepspeed_moe()
        _tidy_saves(words)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "megatron":
            raise
        _refuse(f"no module {missing.name}: {script} must stand in a Megatron-LM tree, or have one on PYTHONPATH")
    except RuntimeError as unfit:
        _refuse(str(unfit))
    say_on_interrupt(lambda: "what was trained since the last checkpoint is not saved")
    if on_cpu:
        _run_alone(script)
    else:
        runpy.run_path(str(script), run_name="__main__")


def on_gloo(argv: Sequence[str]) -> bool:
    """Whether a command line has Megatron-LM's `--distributed-backend gloo`."""
    words = list(argv)
    pairs = zip(words, [*words[1:], ""], strict=True)
    return "--distributed-backend=gloo" in words or ("--distributed-backend", "gloo") in pairs


def _tidy_saves(words: Sequence[str]) -> None:
    """Spares every rank the server that a save starts; Megatron-LM's saves in the background need it."""
    if "--async-save" in words:
        return
    from hp_plugin.upstream.write_results import write_without_server

    with suppress(RuntimeError):  # a release that keeps its results elsewhere
        write_without_server()


def _put_first(directory: str) -> None:
    """Makes a script's directory what it is when Python runs the script itself: the first on `sys.path`."""
    if sys.path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]  # what `python -m` put there in its stead
    sys.path.insert(0, directory)


def _run_alone(script: Path) -> None:
    """Runs a script as `runpy.run_path` does, but for processes it spawns: they import this module in its stead.

    Python has them import the parent's main script, where Megatron-LM would look for CUDA without the CPU backend.
    """
    main_module = ModuleType("__main__")
    main_module.__file__, main_module.__spec__ = str(script), sys.modules["__main__"].__spec__
    sys.modules["__main__"] = main_module
    exec(compile(script.read_bytes(), str(script), "exec"), vars(main_module))


def _enable_cpu(megatron_experts: bool) -> bool:
    """Runs Megatron-LM on the CPU where there is no CUDA, and says so; returns whether it does.

    Where there is, its ranks have the GPUs in turn.
    """
    import torch

    if torch.cuda.is_available():
        from hp_plugin.shared_gpus.placing import GLOO, use_gpu

        # Megatron-LM takes the GPU of this number, of which there may be fewer than ranks.
        os.environ["LOCAL_RANK"] = str(use_gpu(GLOO).index)
        return False
    from hp_plugin.cpu_backend import megatron_lm

    megatron_lm.enable(megatron_experts)
    if _is_first_rank():
        print("hp_plugin: there is no CUDA here: Megatron-LM runs on the CPU, over gloo", flush=True)
    return True


def _refuse(why: str) -> NoReturn:
    refuse(why, "hp_plugin.launch")


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    begin_rank()
    main(sys.argv[1:])
