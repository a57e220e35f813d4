"""Says whether the running interpreter has exactly the versions of a requirements file; exit status 0 if so, else 1.

Usage: python tools/check_pins.py tests/requirements.txt
"""

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path


def mismatches(requirements: str) -> Iterator[str]:
    """One line for each pin that is not met; a local build (2.13.0+cpu) meets the public version it is built from."""
    from packaging.requirements import Requirement

    for line in requirements.splitlines():
        text = line.split("#")[0].strip()
        if not text:
            continue
        pin = Requirement(text)
        if pin.marker and not pin.marker.evaluate():
            continue
        try:
            found = metadata.version(pin.name)
        except metadata.PackageNotFoundError:
            yield f"{pin.name}{pin.specifier} is missing"
            continue
        if not pin.specifier.contains(found, prereleases=True):
            yield f"{pin.name}{pin.specifier} is wanted, {found} is there"


def main(path: str) -> int:
    try:
        wrong = list(mismatches(Path(path).read_text("utf-8")))
    except ModuleNotFoundError as error:
        wrong = [f"{error.name} is missing"]
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
