#!/usr/bin/env python
"""Go on from prompts with a checkpoint of examples/pretrain_gpt.py, on whatever layout it was trained.

    torchrun --nproc-per-node 4 examples/generate.py --load runs/quickstart/checkpoint --head-dim-parallel 2,2 \\
        --prompt "def " "import " --max-new-tokens 100 --temperature 0.7 --top-k 20 --seed 1

The ranks share the model as in training, and each of them caches one P-th of the keys and values. `hp-plugin generate`
takes the same options and starts the ranks itself.
"""

import argparse
import io
import os
import signal
import sys
import warnings

if __name__ == "__main__":
    from hp_plugin.processes.rank import begin_rank

    begin_rank()  # first of all: how it ends must be settled before anything can go wrong
    # Every rank would say which optional packages Megatron-Core does without and which torch calls it uses still.
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning, "torch.distributed")

from hp_plugin.checkpoint.checks import WrongModelError
from hp_plugin.generation.job import prepare, steps
from hp_plugin.generation.options import add_arguments, read_options
from hp_plugin.generation.printing import Page
from hp_plugin.processes.interrupts import INTERRUPTED, leave
from hp_plugin.processes.refusals import refuse
from hp_plugin.training.distributed import find_world_size


def stop(signum: int, frame: object) -> None:
    """Both Ctrl-C and torchrun's own way to end a rank: what was generated is shown, and the rank is gone."""
    raise KeyboardInterrupt


def main() -> None:
    """Runs the command line; a mistake in it ends with one line on stderr and status 2."""
    parser = argparse.ArgumentParser(description="Generate text from a checkpoint of the reference trainer.")
    add_arguments(parser)
    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_args()
    try:
        if find_world_size() > 1 and args.prompt is None and args.prompt_file in (None, "-"):
            raise ValueError(
                "ranks cannot share standard input: give --prompt or --prompt-file, or use hp-plugin generate"
            )
        options = read_options(args)
        job, tokenizer = prepare(options)
        if job.ranks != find_world_size():
            raise ValueError(f"this layout takes {job.ranks} ranks, and there are {find_world_size()}: start as many")
    except ValueError as mistake:
        refuse(str(mistake))
    signal.signal(signal.SIGTERM, stop)
    # Every rank has every token; the first one says so.
    first = os.environ.get("RANK", "0") == "0"
    try:
        with Page(options.prompts, tokenizer, job.new_tokens, sys.stdout if first else io.StringIO()) as page:
            for step in steps(job):
                page.step(step)
    except WrongModelError as mistake:
        refuse(str(mistake))
    except KeyboardInterrupt:
        leave(INTERRUPTED)
    if first:
        print(f"\n{page.speed}", file=sys.stderr)


if __name__ == "__main__":
    main()
