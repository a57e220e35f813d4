"""`hp-plugin generate`: text from a checkpoint of the reference trainer, on any layout, as it comes."""

from __future__ import annotations

import argparse
import sys
import warnings

from hp_plugin.generation import options as generation_options

FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `generate` to a parser or subparser."""
    generation_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Generates on ranks of this machine; 1 if a rank failed, 130 after Ctrl-C, which leaves what was generated.

    Raises:
        ValueError: an option, prompt or checkpoint that cannot run; no rank was started.
    """
    with warnings.catch_warnings():
        # Megatron-Core says on import which optional packages are missing; `hp-plugin doctor` says it once.
        warnings.simplefilter("ignore")
        options = generation_options.read_options(args)
        from hp_plugin.generation.job import prepare
        from hp_plugin.generation.printing import Page
        from hp_plugin.generation.start import RankFailedError, started

        job, tokenizer = prepare(options)
        status = 0
        with Page(options.prompts, tokenizer, job.new_tokens, sys.stdout) as page:
            try:
                with started(job) as steps:
                    for step in steps:
                        page.step(step)
            except KeyboardInterrupt:
                status = INTERRUPTED
            except RankFailedError as failure:
                status = FAILED
                print(f"hp-plugin: error: {failure}", file=sys.stderr)
    print(f"\n{page.speed}" + (" (stopped)" if status == INTERRUPTED else ""), file=sys.stderr)
    return status
