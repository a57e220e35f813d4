"""Core attention of wide heads, fused and unfused.

python -m hp_plugin.bench.gpu.wide_heads RESULT.json [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch

from hp_plugin.bench import core_attention

SHAPES: dict[str, list[str]] = {
    "the source's heads, TP=8": ["--num-attention-heads", "2", "--num-query-groups", "2", "--seq-length", "4096"],
    "the source's heads, all of them": ["--num-attention-heads", "16", "--num-query-groups", "16"],
    "grouped": ["--num-attention-heads", "16", "--num-query-groups", "2"],
    "windowed": ["--num-attention-heads", "16", "--num-query-groups", "2", "--seq-length", "4096", "--window", "511"],
    "d = 128": ["--num-attention-heads", "32", "--num-query-groups", "8", "--kv-channels", "128"],
}
_TINY = [
    "--seq-length",
    "32",
    "--kv-channels",
    "16",
    "--rounds",
    "2",
    "--num-attention-heads",
    "4",
    "--num-query-groups",
    "2",
]


def main() -> None:
    """Measures every shape and writes what `hp_plugin.bench.core_attention` found."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description="Core attention of wide heads, fused and unfused.")
    parser.add_argument("result", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    common = ["--seq-length", "2048", "--dtype", "bf16" if torch.cuda.is_available() else "fp32"]
    options = core_attention.arguments()
    found = {
        name: core_attention.measure(options.parse_args([*common, *words, *(_TINY if args.dry_run else [])]))
        for name, words in SHAPES.items()
    }
    args.result.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    for one in found.values():
        print("\n".join(core_attention.described(one)))


if __name__ == "__main__":
    main()
