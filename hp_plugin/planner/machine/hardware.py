"""A machine: GPUs, links and measured rates, every figure with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from hp_plugin.planner.machine.attention_rate import AttentionKernel
from hp_plugin.planner.machine.collectives import Collectives
from hp_plugin.planner.machine.curve import TimeCurve
from hp_plugin.planner.machine.description import (
    FIELDS,
    attention_kernels,
    inherited,
    measured_collectives,
    shipped_entries,
    table,
)
from hp_plugin.planner.machine.gemm import GemmTable
from hp_plugin.planner.machine.json_file import names_file, read_object
from hp_plugin.planner.machine.parameter import PARAMETERS, Parameter, read_parameters
from hp_plugin.refusal import first_reasons, shown


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

    def attention_kernel(self, fused: bool) -> AttentionKernel:
        """The attention kernel of a Transformer Engine stack (`fused`), or of a plain PyTorch stack."""
        return self.attention[self.kernels[0 if fused else -1]]

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
    return {name: str(entry["description"]) for name, entry in shipped_entries().items()}


@cache
def load_hardware(name: str) -> Hardware:
    """A shipped machine by name, or a user's from a JSON file of the same form (docs/planner.md).

    Raises:
        ValueError: no such machine, or the description is malformed; the message names the field.
    """
    entries = shipped_entries()
    if name in entries:
        return _build(name, entries[name], None)
    path = Path(name)
    if path.suffix == ".json" or names_file(name):
        return _build(path.stem, read_object(path, "hardware file"), path.parent)
    near = get_close_matches(name, entries, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"unknown hardware {shown(name)}: choose from {', '.join(entries)} or give a .json file{hint}")


def _build(name: str, entry: Mapping[str, Any], folder: Path | None) -> Hardware:
    unknown = sorted(set(entry) - set(FIELDS))
    if unknown:
        raise ValueError(f"hardware {name}: unknown field {shown(unknown[0])}; known are {', '.join(sorted(FIELDS))}")
    entry = inherited(name, entry)
    missing = [field for field in PARAMETERS if field not in entry["parameters"]]
    missing += [field for field in ("gemm", "attention", "kernels", "collectives") if field not in entry]
    if missing:
        raise ValueError(f"hardware {name}: missing {', '.join(missing)} (or name a machine in based_on to inherit)")
    parameters = read_parameters(name, entry["parameters"])
    try:
        gemm = table("gemm", entry["gemm"], folder)
        attention = table("attention", entry["attention"], folder)
        curves = table("collectives", entry["collectives"], folder)
        products = GemmTable(((*row[:4], row[4] * 1e12) for row in gemm["rows"]), str(gemm["source"]))
        kernels = attention_kernels(attention, int(parameters["multiprocessors"].value))
        if not isinstance(entry["kernels"], list):
            raise ValueError(f"hardware {name}, kernels: expected a list of names, got {shown(entry['kernels'])}")
        order = tuple(str(kernel) for kernel in entry["kernels"])
        for kernel in order:
            if kernel not in kernels:
                raise ValueError(f"hardware {name}, kernels: {shown(kernel)} is not in the attention table")
        collectives = measured_collectives(curves, parameters)
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
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        said = shown(error.args[0]) if error.args else "nothing there"
        raise ValueError(f"hardware {name}: malformed table, {type(error).__name__}: {said}") from None
    except ValueError as error:
        said = first_reasons(str(error), 200)
        raise ValueError(said if said.startswith("hardware ") else f"hardware {name}: {said}") from None
    described = str(entry.get("description", name))
    return Hardware(name, described, parameters, products, kernels, order, collectives, tuple(sources))
