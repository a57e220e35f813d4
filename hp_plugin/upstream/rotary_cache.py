"""Megatron-Core caches rotary angles, and with them the module that made them and all that hangs on it."""

from __future__ import annotations

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding


def forget_angles() -> None:
    """Lets go of the modules: of hooks on them, the models behind those, and process groups with their threads.

    Releases: all (0.15 to 0.19), whose `forward` is a `functools.lru_cache` of methods; nothing where it is not.
    """
    for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
        clear = getattr(embedding.forward, "cache_clear", None)
        if clear is not None:
            clear()
