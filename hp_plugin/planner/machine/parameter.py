"""A figure with its source: nothing enters a prediction without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from typing import Any

from hp_plugin.refusal import shown

PARAMETERS = {
    "memory_bytes": "device memory",
    "reserved_bytes": "memory that the model cannot have (context, communication buffers, fragmentation)",
    "hbm_bytes_per_s": "memory bandwidth that kernels reach",
    "peak_flops": "dense 16-bit peak, operations per second",
    "multiprocessors": "streaming multiprocessors",
    "collective_multiprocessors": "multiprocessors that a collective takes from kernels it overlaps",
    "unfused_efficiency": "share of memory bandwidth that the softmax kernels of unfused attention reach",
    "kernel_gap_s": "idle time between two kernels",
    "gemm_efficiency": "rate of matrix products in a running model over their rate alone (clocks, power, cold caches)",
    "gemm_scale": "GEMM rate over the table's",
    "attention_scale": "fused attention rate over the table's",
    "collective_scale": "bandwidth within a domain over the curves'",
    "domain": "GPUs in one fast-link domain",
    "nic_bytes_per_s": "network bandwidth of one GPU",
    "step_s": "latency of one more rank in a ring, within a domain",
    "network_step_s": "latency of one more domain in a ring",
    "tree_step_s": "latency of a doubling of the domains in a tree",
    "many_domains_bytes_per_s": "all-reduce bus bandwidth over more than two full domains",
}
"""Every number a machine description has to give, and its meaning; SI units."""

_LEAST, _MOST = 1e-15, 1e21
"""What no figure of a machine is below or above, from latencies in seconds to operations per second."""
_SHARES = ("unfused_efficiency", "gemm_efficiency")
_WHOLE = ("multiprocessors", "collective_multiprocessors", "domain")

KINDS = {
    "measured": "published measurement",
    "datasheet": "vendor's data sheet",
    "modelled": "published model",
    "derived": "computed from published figures",
    "calibrated": "fitted to the calibration rows of --validate",
    "assumed": "assumption of this planner",
    "user": "given by the user",
    "here": "measured on the machine itself by `hp-plugin compare --predict` or `tools/on_gpu.sh`",
}


@dataclass(frozen=True)
class Parameter:
    """A value in SI units, what kind of figure it is (a key of `KINDS`) and where it comes from."""

    value: float
    kind: str
    source: str

    @classmethod
    def from_json(cls, name: str, entry: object) -> Parameter:
        """Reads `{"value": ..., "kind": ..., "source": ...}`.

        Raises:
            ValueError: a field is missing, the value is no positive number, or the kind is unknown.
        """
        if not isinstance(entry, Mapping):
            raise ValueError(f"{name}: expected an object with value, kind and source, got {shown(entry)}")
        fields: Mapping[str, Any] = entry
        missing = [field for field in ("value", "kind", "source") if field not in fields]
        if missing:
            raise ValueError(f"{name}: missing {', '.join(missing)}")
        value = positive(fields["value"], f"{name}: value")
        if not isinstance(fields["kind"], str) or fields["kind"] not in KINDS:
            raise ValueError(f"{name}: kind {shown(fields['kind'])} is none of {', '.join(KINDS)}")
        return cls(value, str(fields["kind"]), str(fields["source"]))


def positive(value: object, what: str) -> float:
    """A figure of a machine.

    Raises:
        ValueError: it is no positive number, or one of no machine.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 or not isfinite(value):
        raise ValueError(f"{what} must be a positive number, got {shown(value)}")
    if not _LEAST <= value <= _MOST:
        raise ValueError(f"{what} must be between {_LEAST:g} and {_MOST:g}, got {shown(value)}")
    return float(value)


def read_parameters(machine: str, given: Mapping[str, object]) -> dict[str, Parameter]:
    """All of `PARAMETERS` from a machine's description, which has them all.

    Raises:
        ValueError: a name that is none, a malformed figure, a share above 1, a count that is not whole, or collectives
            that leave no multiprocessor for kernels.
    """
    for field in given:
        if field not in PARAMETERS:
            near = get_close_matches(field, PARAMETERS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"hardware {machine}: unknown parameter {shown(field)}{hint}")
    read = {field: Parameter.from_json(f"hardware {machine}, {field}", given[field]) for field in PARAMETERS}
    for field in _SHARES:
        if read[field].value > 1:
            raise ValueError(f"hardware {machine}, {field}: a share is at most 1, got {read[field].value:g}")
    for field in _WHOLE:
        if not read[field].value.is_integer():
            raise ValueError(f"hardware {machine}, {field}: must be a whole number, got {read[field].value:g}")
    all_of_them, taken = read["multiprocessors"].value, read["collective_multiprocessors"].value
    if taken >= all_of_them:
        raise ValueError(
            f"hardware {machine}, collective_multiprocessors: {taken:g} of {all_of_them:g} multiprocessors leave none "
            "for kernels"
        )
    return read
