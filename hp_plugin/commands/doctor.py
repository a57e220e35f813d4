"""`hp-plugin doctor`: what is installed, what training will run on and what is missing for what."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata

from hp_plugin import __version__
from hp_plugin.megatron_lm.releases import ranges, standing

# The ranges of setup.py, which a user may have installed around; distribution -> range known to work.
KNOWN = ranges()

PURPOSES = {
    "python": "everything",
    "torch": "training",
    "megatron-core": "training",
    "transformer-engine": "--transformer-impl transformer_engine: fused layers, FP8, FlashAttention",
    "apex": "fused norms and optimizers where there is no Transformer Engine",
    "flash-attn": "FlashAttention's own kernels inside Transformer Engine",
    "deepspeed": "DeepSpeed engines and DeepSpeed-MoE",
    "matplotlib": "drawing loss curves",
    "tensorboard": "--tensorboard-dir",
}

# Imported, not only looked up: an installation whose binaries do not fit is common and looks complete from outside.
IMPORTED = {"torch": "torch", "megatron-core": "megatron.core", "transformer-engine": "transformer_engine.pytorch"}


@dataclass(frozen=True)
class Facts:
    """What was found on this machine, before any judgement."""

    versions: dict[str, str | None]  # distribution -> version, None where it is not installed
    broken: dict[str, str] = field(default_factory=dict)  # distribution -> why importing it failed
    gpus: list[str] = field(default_factory=list)
    cuda: str | None = None  # the CUDA release torch was built for
    nccl: bool = False
    gloo: bool = False
    cpu_backend: str | None = None  # why hp_plugin.cpu_backend does not fit the installed Megatron-Core


@dataclass(frozen=True)
class Note:
    """What is wrong with one part; a part that is only newer than the known ones does not block, it may well work."""

    text: str
    blocks: bool = True


@dataclass(frozen=True)
class Report:
    """The judgement on `facts`; `backend` is None where nothing can be trained."""

    facts: Facts
    notes: dict[str, Note]  # distribution -> what is wrong with it
    missing: dict[str, str | None]  # what one may want to do -> what is missing for it, None if nothing is
    backend: str | None
    reason: str


def find_facts() -> Facts:
    """Look at the running interpreter, importing what training would import."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PURPOSES:
        if name != "python":
            versions[name] = _version(name)
    broken = {name: why for name in IMPORTED if versions[name] and (why := _import_error(IMPORTED[name]))}
    if not versions["torch"] or "torch" in broken:
        return Facts(versions, broken)
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    distributed = torch.distributed.is_available()
    usable = versions["megatron-core"] and "megatron-core" not in broken
    return Facts(
        versions,
        broken,
        gpus=gpus if torch.cuda.is_available() else [],
        cuda=torch.version.cuda,
        nccl=distributed and torch.distributed.is_nccl_available(),
        gloo=distributed and torch.distributed.is_gloo_available(),
        cpu_backend=_cpu_backend_error() if usable else None,
    )


def judge(facts: Facts) -> Report:
    """Say what these facts allow; the first of GPUs and CPU that can train is the backend."""
    notes = {name: note for name in facts.versions if (note := _note(facts, name))}
    lacks = {name: f"{name}: {note.text}" for name, note in notes.items() if note.blocks}
    training = "; ".join(lacks[name] for name in ("python", "torch", "megatron-core") if name in lacks)
    no_gpu = "torch sees no CUDA device" if facts.cuda else "this torch is built without CUDA"
    no_nccl = "" if facts.nccl else "this torch is built without NCCL"
    gpu_missing = training or ("" if facts.gpus else no_gpu) or no_nccl
    cpu_missing = training or ("" if facts.gloo else "this torch is built without gloo") or facts.cpu_backend or ""
    if facts.gpus and not cpu_missing:
        cpu_missing = "not while torch sees CUDA devices: hide them from the run with CUDA_VISIBLE_DEVICES="
    missing = {
        "count and plan (no torch needed)": lacks.get("python", ""),
        "train on GPUs over NCCL": gpu_missing,
        "train on the CPU over gloo": cpu_missing,
        "train with Transformer Engine layers": lacks.get("transformer-engine") or gpu_missing,
        "draw loss curves": lacks.get("matplotlib", ""),
        "write TensorBoard logs": lacks.get("tensorboard", ""),
    }
    if not gpu_missing:
        backend, reason = "cuda+nccl", f"torch sees {len(facts.gpus)} CUDA device(s)"
    elif not cpu_missing:
        backend, reason = "cpu+gloo", gpu_missing
    else:
        backend, reason = None, training or f"GPUs: {gpu_missing}; CPU: {cpu_missing}"
    return Report(facts, notes, {want: lack or None for want, lack in missing.items()}, backend, reason)


def render(report: Report) -> Iterator[str]:
    """The report as lines of text."""
    facts = report.facts
    rows = [("part", "found", "works with", "for")]
    for name, version in facts.versions.items():
        rows.append((name, version or "-", KNOWN.get(name, ""), PURPOSES[name]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    yield f"hp-plugin {__version__}"
    yield ""
    for row in rows:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
    for name, note in report.notes.items():
        if facts.versions[name]:
            yield f"! {name}: {note.text}"
    core, python = facts.versions["megatron-core"], facts.versions["python"]
    if core and python:
        yield f"Megatron-Core {core} on Python {python}: {standing(core, python)}"
    yield ""
    yield f"GPUs: {', '.join(facts.gpus) or 'none'}; torch is built for CUDA: {facts.cuda or 'no'}"
    yield f"process groups: NCCL {'yes' if facts.nccl else 'no'}, gloo {'yes' if facts.gloo else 'no'}"
    yield ""
    for want, lack in report.missing.items():
        yield f"{'no ' if lack else 'yes'}  {want}" + (f": {lack}" if lack else "")
    yield ""
    if report.backend:
        yield f"Training will use {report.backend}, because {report.reason}."
    else:
        yield f"Nothing can be trained here: {report.reason}."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hp-plugin doctor`."""
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit status is 0 where some backend can train, else 1."""
    # Upstream packages talk while they are imported; stdout is for the report alone.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = judge(find_facts())
    print(json.dumps(asdict(report), indent=2) if args.json else "\n".join(render(report)))
    return 0 if report.backend else 1


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    try:
        import_module(module)
    except Exception as error:
        return _first_line(error)
    return None


def _cpu_backend_error() -> str | None:
    from hp_plugin import cpu_backend

    try:
        for hook in cpu_backend.HOOKS:
            hook.check()
    except Exception as error:
        return f"the CPU backend does not fit this Megatron-Core: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _note(facts: Facts, name: str) -> Note | None:
    found = facts.versions[name]
    if not found:
        return Note("not installed")
    if name in facts.broken:
        return Note(f"cannot be imported ({facts.broken[name]})")
    for clause in KNOWN.get(name, "").split(","):
        if clause.startswith(">=") and _release(found) < _release(clause[2:]):
            return Note(f"{found} is too old, {KNOWN[name]} is needed")
        if clause.startswith("<") and _release(found) >= _release(clause[1:]):
            return Note(f"{found} is newer than what is known to work, {KNOWN[name]}", blocks=False)
    return None


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in numbers.group().split(".")) if numbers else ()
