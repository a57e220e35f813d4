"""A machine: GPUs, links and measured rates, every figure with its source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from hp_plugin.planner.machine.attention_rate import AttentionKernel, Occupancy
from hp_plugin.planner.machine.collectives import Collectives, Links
from hp_plugin.planner.machine.curve import TimeCurve
from hp_plugin.planner.machine.gemm import GemmTable
from hp_plugin.planner.machine.json_file import read_object
from hp_plugin.planner.machine.parameter import PARAMETERS, Parameter, read_parameters


@dataclass(frozen=True, eq=False)
class Hardware:
    """A machine as the predictions see it.

    `parameters` holds every scalar of `PARAMETERS` with its source; `sources` names the tables behind the rest;
    `kernels` names the attention kernel of a Transformer Engine stack first, that of a plain PyTorch stack last.
    """

    name: str
    description: str
    parameters: Mapping[str, Parameter]
    gemm: GemmTable
    attention: Mapping[str, AttentionKernel]
    kernels: tuple[str, ...]
    collectives: Collectives
    sources: tuple[str, ...]

    def __getitem__(self, name: str) -> float:
        """The value of one of `PARAMETERS`."""
        return self.parameters[name].value

    @property
    def domain(self) -> int:
        """GPUs in one fast-link domain."""
        return int(self["domain"])

    def with_parameter(self, name: str, value: float, kind: str, source: str) -> Hardware:
        """The same machine with one scalar replaced."""
        return replace(self, parameters={**self.parameters, name: Parameter(value, kind, source)})

    def with_gemm(self, table: GemmTable) -> Hardware:
        """The same machine with the user's own GEMM table, which is then taken as it is."""
        scaled = self.with_parameter("gemm_scale", 1.0, "user", table.source)
        return replace(scaled, gemm=table, sources=(*self.sources, f"GEMM (user): {table.source}"))

    def with_curves(self, curves: Mapping[tuple[str, int, int], TimeCurve], source: str) -> Hardware:
        """The same machine with measured collectives of the user's own."""
        return replace(
            self,
            collectives=self.collectives.replaced(curves),
            sources=(*self.sources, f"collectives (user): {source}"),
        )


def shipped() -> dict[str, str]:
    """Names and descriptions of the machines that come with the package."""
    return {name: str(entry["description"]) for name, entry in _shipped_entries().items()}


@cache
def load_hardware(name: str) -> Hardware:
    """A shipped machine by name, or a user's from a JSON file of the same form (docs/planner.md).

    Raises:
        ValueError: no such machine, or the description is malformed; the message names the field.
    """
    entries = _shipped_entries()
    if name in entries:
        return _build(name, entries[name], None)
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        return _build(path.stem, read_object(path, "hardware file"), path.parent)
    near = get_close_matches(name, entries, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"unknown hardware {name!r}: choose from {', '.join(entries)} or give a .json file{hint}")


def package_json(name: str) -> Any:
    """One of the planner's data files, by its path in the package."""
    return json.loads(resources.files("hp_plugin.planner").joinpath(*name.split("/")).read_text(encoding="utf-8"))


@cache
def _shipped_entries() -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = package_json("machine/data/hardware.json")
    return entries


def _build(name: str, entry: Mapping[str, Any], folder: Path | None) -> Hardware:
    known = {"description", "based_on", "parameters", "gemm", "attention", "kernels", "collectives"}
    unknown = sorted(set(entry) - known)
    if unknown:
        raise ValueError(f"hardware {name}: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")
    entry = _inherited(name, entry)
    missing = [field for field in PARAMETERS if field not in entry["parameters"]]
    missing += [field for field in ("gemm", "attention", "kernels", "collectives") if field not in entry]
    if missing:
        raise ValueError(f"hardware {name}: missing {', '.join(missing)} (or name a machine in based_on to inherit)")
    parameters = read_parameters(name, entry["parameters"])
    try:
        gemm = _table("gemm", entry["gemm"], folder)
        attention = _table("attention", entry["attention"], folder)
        curves = _table("collectives", entry["collectives"], folder)
        table = GemmTable(((*row[:4], row[4] * 1e12) for row in gemm["rows"]), str(gemm["source"]))
        kernels = _kernels(attention, int(parameters["multiprocessors"].value))
        if not isinstance(entry["kernels"], list):
            raise ValueError(f"hardware {name}, kernels: expected a list of names, got {entry['kernels']!r}")
        order = tuple(str(kernel) for kernel in entry["kernels"])
        for kernel in order:
            if kernel not in kernels:
                raise ValueError(f"hardware {name}, kernels: {kernel!r} is not in the attention table")
        collectives = _collectives(curves, parameters)
        sources = [f"GEMM ({gemm['kind']}): {gemm['source']}"]
        sources += [
            f"attention, {known} ({attention['kernels'][known]['kind']}): {kernels[known].source}" for known in kernels
        ]
        sources += [f"attention occupancy ({attention['occupancy']['kind']}): {attention['occupancy']['source']}"]
        sources += [
            f"{curve['collective']}, {curve['ranks']} ranks in {curve['nodes']} domain(s) ({curve['kind']}): "
            f"{curve['source']}"
            for curve in curves["curves"]
        ]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"hardware {name}: malformed table, {type(error).__name__}: {error}") from None
    described = str(entry.get("description", name))
    return Hardware(name, described, parameters, table, kernels, order, collectives, tuple(sources))


def _inherited(name: str, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    own = entry.get("parameters", {})
    if not isinstance(own, Mapping):
        raise ValueError(f"hardware {name}, parameters: expected an object, got {own!r}")
    base = entry.get("based_on")
    if base is None:
        return {**entry, "parameters": own}
    if not isinstance(base, str) or base not in _shipped_entries():
        raise ValueError(f"hardware {name}: based_on {base!r} is none of {', '.join(_shipped_entries())}")
    parent = _inherited(base, _shipped_entries()[base])
    merged = {**parent, **{key: value for key, value in entry.items() if key != "based_on"}}
    merged["parameters"] = {**parent["parameters"], **own}
    return merged


def _table(what: str, reference: object, folder: Path | None) -> Any:
    """A table written in place, in a file beside the description, or in the package."""
    if not isinstance(reference, str):
        return reference
    if folder is not None and (folder / reference).exists():
        return read_object(folder / reference, f"{what} table")
    try:
        return package_json(f"machine/data/{reference}")
    except OSError:
        raise ValueError(f"no {what} table {reference!r}, neither beside the description nor in the package") from None


def _kernels(table: Mapping[str, Any], multiprocessors: int) -> dict[str, AttentionKernel]:
    shape = table["occupancy"]
    occupancy = Occupancy(
        int(shape["tile_rows"]), float(shape["half_waves"]), float(shape["reference_waves"]), multiprocessors
    )
    return {name: AttentionKernel.from_json(name, entry, occupancy) for name, entry in table["kernels"].items()}


def _collectives(table: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> Collectives:
    within = 1.0 / parameters["collective_scale"].value
    nic = parameters["nic_bytes_per_s"].value
    across = float(table.get("nic_bytes_per_s", nic)) / nic
    curves = {}
    for entry in table["curves"]:
        # Faster links shorten a transfer, not its latency.
        factor = within if int(entry["nodes"]) == 1 else across
        if not entry["points"]:
            raise ValueError(
                f"{entry['collective']}, {entry['ranks']} ranks: a curve needs points of (bytes, microseconds)"
            )
        latency = min(micros for _, micros in entry["points"])
        points = [
            (float(size), (latency + max(0.0, micros - latency) * factor) * 1e-6) for size, micros in entry["points"]
        ]
        curves[entry["collective"], int(entry["ranks"]), int(entry["nodes"])] = TimeCurve.from_points(points)
    links = Links(
        int(parameters["domain"].value),
        *(
            parameters[field].value
            for field in ("nic_bytes_per_s", "step_s", "network_step_s", "tree_step_s", "many_domains_bytes_per_s")
        ),
    )
    return Collectives(curves, links)
