"""`--moe-backend deepspeed` for an unmodified Megatron-LM script: its mixtures become DeepSpeed-MoE."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import wraps
from typing import Any

FLAG, BACKENDS = "--moe-backend", ("megatron", "deepspeed")


def take_backend(words: Sequence[str]) -> tuple[list[str], str]:
    """A command line without the flag, which Megatron-LM's parser does not know, and what the flag says.

    Raises:
        ValueError: the flag has no value or an unknown one, or asks for DeepSpeed's experts where there are none.
    """
    left, backend = [], BACKENDS[0]
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != FLAG:
            left.append(word)
            continue
        backend = value if equals else next(rest, "")
        if backend not in BACKENDS:
            raise ValueError(f"{FLAG} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "deepspeed" and not any(word.partition("=")[0] == "--num-experts" for word in left):
        raise ValueError(f"{FLAG} deepspeed says whose mixture of experts: give --num-experts with it")
    return left, backend


def use_deepspeed_moe() -> None:
    """From now on every GPT model of this process has DeepSpeed-MoE where its layer specs say Megatron's `MoELayer`.

    A mixture that is built in another way ends the run. Can go where the script passes its specs through
    `deepspeed_moe_spec` itself.

    Raises:
        RuntimeError: `GPTModel` does not take its layer specs as in the releases known to work.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from hp_plugin.deepspeed_adapter.moe.model_check import check_mixtures
    from hp_plugin.deepspeed_adapter.moe.specs import deepspeed_moe_spec

    original = GPTModel.__init__
    signature = inspect.signature(original)
    if not {"self", "config", "transformer_layer_spec", "mtp_block_spec"} <= signature.parameters.keys():
        raise RuntimeError(f"{FLAG} deepspeed: this Megatron-Core's GPTModel takes no layer specs that can be replaced")

    @wraps(original)
    def __init__(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        for name in ("transformer_layer_spec", "mtp_block_spec"):
            if call.arguments.get(name) is not None:
                # A pipeline stage can hold dense layers alone.
                call.arguments[name] = deepspeed_moe_spec(call.arguments[name], required=False)
        original(*call.args, **call.kwargs)
        check_mixtures(call.arguments["self"], call.arguments["config"])

    def refuse(layer: MoELayer, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"{FLAG} deepspeed: this script builds Megatron's {type(layer).__name__} outside the layer specs of a GPT "
            f"model, or by a spec that this hp_plugin does not know: train it with {FLAG} {BACKENDS[0]}"
        )

    MoELayer.__init__ = refuse  # type: ignore[method-assign]
    GPTModel.__init__ = __init__  # type: ignore[method-assign]
