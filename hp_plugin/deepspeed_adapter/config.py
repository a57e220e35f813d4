"""The grid as an option of a DeepSpeed configuration: `{"head_dim_parallel": {"m": 4, "n": 4, "exchange": "auto"}}`."""

from __future__ import annotations

import base64
import difflib
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from hp_plugin.config import HeadDimConfig
from hp_plugin.deepspeed_adapter.guard import KEY
from hp_plugin.deepspeed_adapter.settings import gradient_clipping, half_precision, section, zero_config
from hp_plugin.refusal import shorten, shown

_EXAMPLE = f'{{"{KEY}": {{"m": 4, "n": 4, "exchange": "auto"}}}}'


def load_settings(config: Any) -> dict[str, Any]:
    """A DeepSpeed configuration as a dictionary, from whatever DeepSpeed takes: a dictionary, a path, base64 of JSON.

    Source: `deepspeed.runtime.tensor_parallel.init_utils.load_ds_config`, which takes a key twice in base64.

    Raises:
        ValueError: no such file and no base64, a key that is there twice, or no JSON object; names the file.
    """
    if isinstance(config, dict):
        return config
    if not isinstance(config, (str, os.PathLike)):
        raise ValueError(
            f"a DeepSpeed configuration must be a dictionary, a path or base64 of JSON, got {shown(config)}"
        )
    # DeepSpeed's own dialect of JSON, with comments; comes with it.
    import hjson

    where, content = _read(os.fspath(config))
    try:
        settings = hjson.loads(content.decode("utf-8"), object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError(f"{where} is nested too deep for a DeepSpeed configuration") from None
    except ValueError as wrong:
        raise ValueError(f"{where} cannot be read: {shorten(str(wrong))}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{where} must be a JSON object, got {shown(settings)}")
    return settings


def _read(config: str) -> tuple[str, bytes]:
    """What a configuration is called in messages, and its bytes."""
    with suppress(OSError, ValueError):  # too long a name, or a character that none has: no file
        if Path(config).is_file():
            return config, Path(config).read_bytes()
    try:
        return "the DeepSpeed configuration in base64", base64.urlsafe_b64decode(config)
    except ValueError:
        raise ValueError(f"{shown(config)} is no file with a DeepSpeed configuration, and no base64 of one") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} is there twice")
        found[key] = value
    return found


def head_dim_option(settings: Mapping[str, Any]) -> HeadDimConfig | None:
    """The grid that a DeepSpeed configuration asks for, or None if it does not name one.

    Raises:
        ValueError: the option is malformed or misspelled, or contradicts another option of the configuration.
    """
    if KEY not in settings:
        # DeepSpeed passes over keys it does not know, so this typing mistake would train without the grid.
        for key in settings:
            if difflib.get_close_matches(str(key).lower().replace("-", "_"), [KEY], cutoff=0.8):
                raise ValueError(f"the DeepSpeed configuration has {shown(key)}; did you mean {KEY!r}?")
        return None
    option = settings[KEY]
    if not isinstance(option, Mapping):
        raise ValueError(f"{KEY} must be an object with m and n, for example {_EXAMPLE}; got {shown(option)}")
    known = [field.name for field in fields(HeadDimConfig) if field.init]
    for key in option:
        if key not in known:
            raise ValueError(f"{KEY} has no option {shown(key)}{_hint(key, known)}; it knows {', '.join(known)}")
    missing = [name for name in ("m", "n") if name not in option]
    if missing:
        raise ValueError(f"{KEY} needs both m and n, for example {_EXAMPLE}; {' and '.join(missing)} missing")
    head_dim = HeadDimConfig(**option)
    for complaint in _contradictions(settings, head_dim):
        raise ValueError(f"{KEY} m={head_dim.m}, n={head_dim.n}: {complaint}")
    return head_dim


def _contradictions(settings: Mapping[str, Any], head_dim: HeadDimConfig) -> Iterable[str]:
    """What DeepSpeed would do to a model on a grid and must not, with the way out."""
    if head_dim.size == 1:
        return
    autotp = section(settings, "tensor_parallel").get("autotp_size", 0)
    if autotp:
        yield f"tensor_parallel.autotp_size {shown(autotp)} would split the model again: leave tensor_parallel out"
    # A single sequence-parallel rank is none, unless both sizes make a mesh of the ranks.
    if settings.get("sequence_parallel_size", 1) != 1:
        yield (
            f"sequence_parallel_size {shown(settings['sequence_parallel_size'])} asks DeepSpeed for ranks of its own "
            "(Ulysses): leave it out"
        )
    if "data_parallel_size" in settings:
        yield f"data_parallel_size {shown(settings['data_parallel_size'])} is the world over m·n here: leave it out"
    zero = zero_config(settings)
    for key, off in (("zero_hpz_partition_size", 1), ("zero_quantized_gradients", False)):
        if getattr(zero, key, off) != off:
            yield (
                f"zero_optimization.{key} makes groups of neighbouring ranks, which hold different slices of the "
                "model here, not replicas: leave it out"
            )
    half, clip = half_precision(settings), gradient_clipping(settings)
    if half and clip and not zero.stage:
        yield (
            f"{half} with gradient_clipping {clip} at ZeRO stage 0 clips by a wrong norm, as DeepSpeed's optimizer "
            "wrapper forgets there which gradients are sharded: set zero_optimization.stage to 1 (or gradient_clipping "
            "to 0)"
        )


def _hint(key: Any, known: list[str]) -> str:
    near = difflib.get_close_matches(str(key).lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
