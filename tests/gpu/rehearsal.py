"""Parameters of GPU tests, some of which a rehearsal on the CPU keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest


def marked(cases: Mapping[str, Any], *kept: str) -> list[Any]:
    """A parameter for each case, those in `kept` marked."""
    return [pytest.param(case, id=name, marks=pytest.mark.kept if name in kept else ()) for name, case in cases.items()]
