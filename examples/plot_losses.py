#!/usr/bin/env python
"""Lay loss curves over each other: a table, the largest difference from the first curve, and a picture.

    python examples/plot_losses.py "stock=stock.json" "grid 2x2=grid.json" --png losses.png --tolerance 1e-4

A curve is what examples/pretrain_gpt.py writes with --loss-file: {iteration: lm loss}. With --tolerance the exit status
is 1 if a curve is further than that from the first one anywhere.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

Curve = dict[int, float]


def read_curve(text: str) -> tuple[str, Curve]:
    """The name and the losses of an argument NAME=FILE."""
    name, _, file = text.rpartition("=")
    try:
        losses = {int(iteration): float(loss) for iteration, loss in json.loads(Path(file).read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{file!r} is not a loss file: {error}") from error
    if not losses:
        raise argparse.ArgumentTypeError(f"{file!r} holds no iteration")
    return name or Path(file).stem, losses


def shown(iterations: Sequence[int]) -> list[int]:
    """About ten of the iterations, at round numbers, always with the first and the last."""
    steps = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    every = next(step for step in steps if step * 10 >= len(iterations))
    return sorted({iterations[0], *iterations[every - 1 :: every], iterations[-1]})


def table(curves: dict[str, Curve], iterations: Sequence[int]) -> list[str]:
    """One line per shown iteration, one column per curve."""
    width = max(12, *map(len, curves))
    lines = [f"{'iteration':>9}  " + "  ".join(f"{name:>{width}}" for name in curves)]
    for iteration in shown(iterations):
        lines.append(f"{iteration:>9}  " + "  ".join(f"{curve[iteration]:>{width}.6f}" for curve in curves.values()))
    return lines


def differences(curves: dict[str, Curve], iterations: Sequence[int]) -> dict[str, tuple[float, int]]:
    """For every curve but the first: its largest distance from the first, and the iteration where that is.

    A loss that is not a number counts as infinitely far away.
    """
    (_, reference), *others = curves.items()

    def distance(curve: Curve, iteration: int) -> float:
        gap = abs(curve[iteration] - reference[iteration])
        return gap if gap == gap else float("inf")

    return {name: max((distance(curve, at), at) for at in iterations) for name, curve in others}


def draw(curves: dict[str, Curve], iterations: Sequence[int], png: Path) -> None:
    """The curves on top of each other, and below them how far each is from the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    (first, reference), *_ = curves.items()
    # Equal curves hide each other, so each is drawn thinner than the one under it.
    widths = [2 + 3 * place for place in reversed(range(len(curves)))]
    for (name, curve), width in zip(curves.items(), widths, strict=True):
        color = above.plot(iterations, [curve[at] for at in iterations], linewidth=width, label=name)[0].get_color()
        if name != first:
            gaps = [abs(curve[at] - reference[at]) for at in iterations]
            below.plot(iterations, gaps, linewidth=1, color=color, label=name)
    above.set_ylabel("lm loss")
    above.legend()
    below.set_ylabel(f"distance from\n{first}")
    below.set_xlabel("iteration")
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare and draw loss curves.")
    parser.add_argument(
        "curves", nargs="+", type=read_curve, metavar="NAME=FILE.json", help="the first is the reference"
    )
    parser.add_argument("--png", type=Path, metavar="FILE.png", help="draw the curves (needs matplotlib)")
    parser.add_argument("--tolerance", type=float, help="largest distance from the first curve that is accepted")
    args = parser.parse_args(arguments)
    curves = dict(args.curves)
    if len(curves) < len(args.curves):
        parser.error("two curves have the same name")
    iterations = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    if not iterations:
        parser.error("the curves have no iteration in common")

    print("\n".join(table(curves, iterations)))
    gaps = differences(curves, iterations)
    first = next(iter(curves))
    for name, (gap, at) in gaps.items():
        print(f"largest difference of {name} from {first}: {gap:.1e} (iteration {at} of {iterations[-1]})")
    if args.png:
        draw(curves, iterations, args.png)
        print(f"curves drawn to {args.png}")
    too_far = [name for name, (gap, _) in gaps.items() if args.tolerance is not None and gap > args.tolerance]
    if too_far:
        print(f"further than {args.tolerance:g} from {first}: {', '.join(too_far)}", file=sys.stderr)
    return 1 if too_far else 0


if __name__ == "__main__":
    sys.exit(main())
