"""Stands in for Transformer Engine in tests: its signatures, attributes and asserts, computing with torch on the CPU.

`released.py` says which release; no line of this is Transformer Engine's. What the tests do not need is not here, so
that Megatron-Core takes it for missing.
"""

from transformer_engine import common, pytorch
from transformer_engine.released import VERSION as __version__

__all__ = ["__version__", "common", "pytorch"]
