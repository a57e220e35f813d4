"""The grid that a benchmark is given, held to the ranks that torchrun has started before any group is made."""

from __future__ import annotations

import argparse
import os
from typing import Any

from hp_plugin.config import HeadDimConfig


def parsed_grid(parser: argparse.ArgumentParser, args: argparse.Namespace) -> HeadDimConfig:
    """`--head-dim-parallel`, with exchange and order where the benchmark has flags for them; ends as argparse does."""
    chosen: dict[str, Any] = {
        name.removeprefix("head_dim_"): value
        for name, value in vars(args).items()
        if name in ("head_dim_exchange", "head_dim_order")
    }
    try:
        head_dim = HeadDimConfig.parse(args.head_dim_parallel, **chosen)
        head_dim.check_world_size(int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as wrong:
        parser.error(f"{wrong}; torchrun --nproc-per-node starts ranks")
    return head_dim
