"""What DeepSpeed itself makes of its configuration, and of it what training on a grid depends on.

DeepSpeed coerces: `"stage": "0"` is stage 0, `zero_optimization: true` stage 1, `"enabled": "false"` off. Whoever reads
the JSON as it stands decides on other values than those that train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from sys import float_info
from typing import Any

from hp_plugin.refusal import shorten, shown

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def zero_config(settings: Mapping[str, Any]) -> Any:
    """DeepSpeed's `DeepSpeedZeroConfig` of a configuration: `stage`, `reduce_scatter`, ….

    Raises:
        ValueError: the section is none, or DeepSpeed refuses a value in it.
    """
    from deepspeed.runtime.zero.config import get_zero_config

    if isinstance(settings.get("zero_optimization"), bool):
        return get_zero_config({"allgather_size": 5e8, **settings})
    return _as_deepspeed_reads("zero_optimization", settings, get_zero_config)


def half_precision(settings: Mapping[str, Any]) -> str | None:
    """`bf16`, `fp16` or None, whichever DeepSpeed would train in.

    Raises:
        ValueError: a section is none, or DeepSpeed refuses a value in it.
    """
    from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config

    # The older name counts where the newer one is not there.
    bf16 = "bf16" if settings.get("bf16") is not None else "bfloat16"
    if _as_deepspeed_reads(bf16, settings, get_bfloat16_config).enabled:
        return "bf16"
    return "fp16" if _as_deepspeed_reads("fp16", settings, get_float16_config).enabled else None


def gradient_clipping(settings: Mapping[str, Any]) -> float:
    """The largest gradient norm; 0 clips nothing.

    Raises:
        ValueError: it is no number.
    """
    value = settings.get("gradient_clipping", 0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= float_info.max:
        raise ValueError(f"gradient_clipping must be a finite number of at least 0, got {shown(value)}")
    return value


def batch_sizes(settings: Mapping[str, Any], replicas: int) -> tuple[int, int, int]:
    """Sequences per step, sequences per micro-batch, micro-batches per step; what is missing, as DeepSpeed derives it.

    Args:
        replicas: data-parallel ranks.

    Raises:
        ValueError: neither of the first two is given, one is no positive integer, or they contradict each other.

    Source: `deepspeed.runtime.config.DeepSpeedConfig._set_batch_related_parameters`.
    """
    given = {key: settings[key] for key in BATCH_KEYS if settings.get(key) is not None}
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**63:
            raise ValueError(f"{key} must be a positive integer, got {shown(value)}")
    train, micro, steps = (given.get(key) for key in BATCH_KEYS)
    if train is None and micro is None:
        raise ValueError(f"the DeepSpeed configuration needs {BATCH_KEYS[0]} or {BATCH_KEYS[1]}")
    if train is None:
        steps = steps or 1
        train = micro * steps * replicas
    elif micro is None:
        steps = steps or 1
        micro = train // replicas // steps
    elif steps is None:
        steps = train // micro // replicas
    if train != micro * steps * replicas:
        raise ValueError(
            f"{BATCH_KEYS[0]} {train} is not {BATCH_KEYS[1]} × {BATCH_KEYS[2]} × data-parallel ranks = "
            f"{micro} × {steps} × {replicas} = {micro * steps * replicas}"
        )
    return train, micro, steps


def section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object of the configuration, empty if it is not there.

    Raises:
        ValueError: something else stands there.
    """
    found = settings.get(name)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} must be an object, got {shown(found)}")
    return found


def _as_deepspeed_reads(name: str, settings: Mapping[str, Any], read: Callable[[dict[str, Any]], Any]) -> Any:
    from pydantic import ValidationError

    found = section(settings, name)
    try:
        return read({name: dict(found)})
    except ValidationError as wrong:
        first = wrong.errors()[0]
        where = shorten(".".join([name, *map(str, first["loc"])]))
        raise ValueError(f"{where}: {shorten(first['msg'])}, got {shown(first.get('input'))}") from None
    except Exception as wrong:  # what its validators run into, such as numbers beyond all fractions
        raise ValueError(f"{name}: DeepSpeed cannot read {shown(dict(found))}: {shorten(str(wrong))}") from None
