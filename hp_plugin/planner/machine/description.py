"""The parts of a machine's description: what it inherits, its tables, its kernels and its collectives."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hp_plugin.planner.machine.attention_rate import AttentionKernel, Occupancy
from hp_plugin.planner.machine.collectives import Collectives, Links
from hp_plugin.planner.machine.curve import TimeCurve
from hp_plugin.planner.machine.json_file import package_folder, package_json, read_object
from hp_plugin.planner.machine.parameter import Parameter, positive
from hp_plugin.refusal import shown

FIELDS = ("description", "order", "based_on", "parameters", "gemm", "attention", "kernels", "collectives")
"""What a description may say; `order` is a shipped machine's place in lists."""

_FOLDER = "machine/data/machines"


@cache
def shipped_entries() -> dict[str, dict[str, Any]]:
    """Descriptions of the machines that come with the package, one per file; those without `order` last, by name."""
    entries = {
        file.removesuffix(".json"): package_json(f"{_FOLDER}/{file}")
        for file in package_folder(_FOLDER)
        if file.endswith(".json")
    }
    return dict(sorted(entries.items(), key=lambda item: (item[1].get("order", float("inf")), item[0])))


def inherited(name: str, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """A description with everything that it takes over from the machines that it is based on.

    Raises:
        ValueError: an unknown base, or parameters that are no object.
    """
    own = entry.get("parameters", {})
    if not isinstance(own, Mapping):
        raise ValueError(f"hardware {name}, parameters: expected an object, got {shown(own)}")
    base = entry.get("based_on")
    if base is None:
        return {**entry, "parameters": own}
    if not isinstance(base, str) or base not in shipped_entries():
        raise ValueError(f"hardware {name}: based_on {shown(base)} is none of {', '.join(shipped_entries())}")
    parent = inherited(base, shipped_entries()[base])
    merged = {**parent, **{key: value for key, value in entry.items() if key != "based_on"}}
    merged["parameters"] = {**parent["parameters"], **own}
    return merged


def table(what: str, reference: object, folder: Path | None) -> Any:
    """A table written in place, in a file beside the description, or in the package.

    Raises:
        ValueError: there is no such file.
    """
    if not isinstance(reference, str):
        return reference
    if folder is not None and (folder / reference).exists():
        return read_object(folder / reference, f"{what} table")
    try:
        return package_json(f"machine/data/{reference}")
    except OSError:
        raise ValueError(
            f"no {what} table {shown(reference)}, neither beside the description nor in the package"
        ) from None


def attention_kernels(given: Mapping[str, Any], multiprocessors: int) -> dict[str, AttentionKernel]:
    """The kernels of an attention table on a GPU with `multiprocessors`."""
    found = given["occupancy"]
    shape = {name: positive(found[name], name) for name in ("tile_rows", "reference_waves")}
    # 0: as fast on any number of tiles, as machines say that measure themselves.
    shape["half_waves"] = 0.0 if found["half_waves"] == 0 else positive(found["half_waves"], "half_waves")
    occupancy = Occupancy(
        max(1, int(shape["tile_rows"])), shape["half_waves"], shape["reference_waves"], multiprocessors
    )
    return {name: AttentionKernel.from_json(name, entry, occupancy) for name, entry in given["kernels"].items()}


def _whole(value: object, what: str) -> int:
    number = positive(value, what)
    if not number.is_integer():
        raise ValueError(f"{what}: must be a whole number, got {shown(value)}")
    return int(number)


def measured_collectives(given: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> Collectives:
    """The curves of a table, carried over to a machine's links.

    Raises:
        ValueError: a curve without points, or an unknown collective.
    """
    within = 1.0 / parameters["collective_scale"].value
    nic = parameters["nic_bytes_per_s"].value
    across = positive(given.get("nic_bytes_per_s", nic), "nic_bytes_per_s of the curves") / nic
    curves = {}
    for entry in given["curves"]:
        # Faster links shorten a transfer, not its latency.
        factor = within if entry["nodes"] == 1 else across
        if not entry["points"]:
            raise ValueError(
                f"{entry['collective']}, {entry['ranks']} ranks: a curve needs points of (bytes, microseconds)"
            )
        what = f"{shown(entry['collective'])}, {shown(entry['ranks'])} ranks"
        measured = [
            (positive(size, f"bytes of {what}"), positive(micros, f"microseconds of {what}"))
            for size, micros in entry["points"]
        ]
        latency = min(micros for _, micros in measured)
        points = [(size, (latency + max(0.0, micros - latency) * factor) * 1e-6) for size, micros in measured]
        ranks, nodes = (_whole(entry[field], f"{field} of {what}") for field in ("ranks", "nodes"))
        if ranks < 2 or ranks % nodes:
            raise ValueError(f"{what}: a curve is of two ranks or more, as many on each of {nodes} node(s)")
        if (entry["collective"], ranks, nodes) in curves:
            raise ValueError(f"{what} on {nodes} node(s) have two curves")
        curves[entry["collective"], ranks, nodes] = TimeCurve.from_points(points)
    links = Links(
        int(parameters["domain"].value),
        *(
            parameters[field].value
            for field in ("nic_bytes_per_s", "step_s", "network_step_s", "tree_step_s", "many_domains_bytes_per_s")
        ),
    )
    return Collectives(curves, links)
