"""Replaces module classes in a layer spec, whatever the release builds its tree of.

Up to 0.16 a tree is of `ModuleSpec`s, dataclasses of submodules, lists and classes. From 0.17 on the experts of a
mixture, from 0.18 on the mixture itself, are a `functools.partial` of their class instead, and a dense MLP is one of
its class's method `as_mlp_submodule`. The second kind can be all that is looked for once a release has no `ModuleSpec`,
the first once 0.19 is out of the range.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass(frozen=True)
class Replacement:
    """The class, or function that makes one, to build in the place of another, and what it is given beside."""

    module: Callable[..., Any]
    params: Mapping[str, Any] = field(default_factory=dict)


def with_replacements(spec: Any, replacements: Mapping[type, Replacement]) -> Any:
    """A copy of a spec tree with classes replaced; the very same object where there are none of them."""
    if isinstance(spec, type):
        found = replacements.get(spec)
        if found is None:
            return spec
        return ModuleSpec(module=found.module, params=dict(found.params)) if found.params else found.module
    if isinstance(spec, partial):
        return _with_replaced_call(spec, replacements)
    if isinstance(spec, (list, tuple)):
        items = [with_replacements(item, replacements) for item in spec]
        return type(spec)(items) if _differ(items, spec) else spec
    if isinstance(spec, ModuleSpec):
        submodules = with_replacements(spec.submodules, replacements)
        found = replacements.get(spec.module) if isinstance(spec.module, type) else None
        if found is None:
            return spec if submodules is spec.submodules else replace(spec, submodules=submodules)
        return replace(spec, module=found.module, params={**spec.params, **found.params}, submodules=submodules)
    if not is_dataclass(spec):
        return spec
    names = [known.name for known in fields(spec)]
    values = [getattr(spec, name) for name in names]
    changed = [with_replacements(value, replacements) for value in values]
    if not _differ(changed, values):
        return spec
    result = copy.copy(spec)
    for name, value in zip(names, changed, strict=True):
        setattr(result, name, value)
    return result


def parts(spec: Any) -> tuple[Any, Any]:
    """The class that a node of the tree builds, and its submodules; None where it has no such thing."""
    if isinstance(spec, partial):
        return _built_class(spec.func), spec.keywords.get("submodules")
    if isinstance(spec, ModuleSpec):
        return spec.module, spec.submodules
    return (spec, None) if isinstance(spec, type) else (None, None)


def build(spec: Any, **arguments: Any) -> Any:
    """The module that a node of the tree describes, as this release's own layers would build it."""
    if isinstance(spec, partial):
        return spec(**arguments)
    from megatron.core.transformer.spec_utils import build_module

    return build_module(spec, **arguments)


def _with_replaced_call(call: partial[Any], replacements: Mapping[type, Replacement]) -> partial[Any]:
    built = _built_class(call.func)
    found = replacements.get(built) if isinstance(built, type) else None
    args = [with_replacements(value, replacements) for value in call.args]
    keywords = {name: with_replacements(value, replacements) for name, value in call.keywords.items()}
    if found is None:
        if not _differ(args, call.args) and not _differ(keywords.values(), call.keywords.values()):
            return call
        return partial(call.func, *args, **keywords)
    module = found.module if call.func is built else getattr(found.module, call.func.__name__)
    return partial(module, *args, **{**keywords, **found.params})


def _built_class(function: Any) -> Any:
    """The class whose instance a call of `function` makes: itself, or whose method it is."""
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, type) else function


def _differ(new: Any, old: Any) -> bool:
    return any(one is not other for one, other in zip(new, old, strict=True))
