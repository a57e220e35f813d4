"""All that is proven and measured on one GPU, stage by stage, each in a process and with a limit of its own.

    python -m hp_plugin.bench.gpu.stages --out DIR [--dry-run]

`bash tools/on_gpu.sh` prepares an environment and runs this. A stage that fails or runs over is reported and the next
one goes on; on_gpu.json and on_gpu.md are written after every stage.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hp_plugin.bench.gpu.page import markdown

ROOT = Path(__file__).parents[3]
_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@dataclass(frozen=True)
class Stage:
    """A command of this Python; `writes` names the JSON that it leaves in the output folder, if it does."""

    name: str
    words: tuple[str, ...]
    limit_s: float
    writes: str | None = None


def all_stages(out: Path, dry_run: bool) -> list[Stage]:
    """In order; their limits are together below eight minutes."""
    small = ("--dry-run",) if dry_run else ()
    tests = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/gpu", *(("--rehearse",) if dry_run else ()))
    bench = "hp_plugin.bench.gpu"

    def ranks(count: int, name: str) -> tuple[str, ...]:
        return (*_RANKS, str(count), "-m", f"{bench}.four_ranks", str(out / name), *small)

    machine = str(out / "machine.json")
    return [
        Stage("wide heads", ("-m", f"{bench}.wide_heads", str(out / "heads.json"), *small), 50, "heads.json"),
        Stage("one rank", ranks(1, "one.json"), 35, "one.json"),
        Stage("four ranks", ranks(4, "four.json"), 70, "four.json"),
        Stage("shard", ("-m", f"{bench}.shard", str(out / "shard.json"), machine, *small), 100, "shard.json"),
        # Last: what is left out when time runs out is the end of a list of tests.
        Stage("tests", tests, 220),
    ]


def run(out: Path, dry_run: bool, only: list[str]) -> dict[str, Any]:
    """Runs the stages and returns what on_gpu.json has."""
    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else None,
        "dry_run": dry_run,
        "system": platform.platform(),
        "versions": {name: _version(name) for name in ("torch", "megatron-core", "deepspeed", "transformer-engine")},
        "stages": {},
    }
    for stage in all_stages(out, dry_run):
        if only and stage.name not in only:
            continue
        print(f"on_gpu: {stage.name} (at most {stage.limit_s:.0f} s)", flush=True)
        # A rehearsal has a slower machine, and nothing that waits for it.
        found["stages"][stage.name] = _run(stage, out, stage.limit_s * (4 if dry_run else 1))
        (out / "on_gpu.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        (out / "on_gpu.md").write_text(markdown(found), "utf-8")
    return found


def _run(stage: Stage, out: Path, limit_s: float) -> dict[str, Any]:
    log = out / f"{stage.name.replace(' ', '_')}.log"
    if stage.writes is not None:
        (out / stage.writes).unlink(missing_ok=True)
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as lines:
        process = subprocess.Popen([sys.executable, *stage.words], cwd=ROOT, stdout=lines, stderr=subprocess.STDOUT)
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun and pytest end their ranks themselves
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            status = None
    result: dict[str, Any] = {"seconds": time.monotonic() - began, "status": status, "log": log.name}
    if stage.writes is not None and (out / stage.writes).exists():
        result["found"] = json.loads((out / stage.writes).read_text("utf-8"))
    if stage.writes is None:
        result["found"] = _outcomes(log.read_text("utf-8", errors="replace"))
    return result


def _outcomes(log: str) -> dict[str, Any]:
    """Of pytest's own lines, also of a run that was cut off: how many tests ended how, and which failed."""
    ends = {name: 0 for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failed = []
    for name, end in re.findall(rf"^(tests/gpu/.+?) ({'|'.join(ends)})\b", log, re.MULTILINE):
        ends[end] += 1
        failed += [name] if end in ("FAILED", "ERROR") else []
    return {**{name.lower(): count for name, count in ends.items()}, "which_failed": failed}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> int:
    """0 if every stage ended well."""
    parser = argparse.ArgumentParser(description="Everything that is proven and measured on one GPU.")
    parser.add_argument("--out", type=Path, default=Path("runs/on_gpu"))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, also where there is no GPU")
    parser.add_argument("--stage", action="append", default=[], help="this one alone; may be given several times")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        print("on_gpu: error: torch sees no CUDA device; --dry-run goes through all stages without", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    found = run(out, args.dry_run, args.stage)
    bad = [name for name, stage in found["stages"].items() if stage["status"] != 0]
    print(f"on_gpu: {out}/on_gpu.md" + (f"; not well ended: {', '.join(bad)}" if bad else ""), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
