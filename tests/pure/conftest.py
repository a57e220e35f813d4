"""What is tested here needs the standard library alone, so nothing more can be imported while a test here runs."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

UPSTREAM = ("torch", "numpy", "megatron", "deepspeed", "transformer_engine", "matplotlib", "transformers")


class NotHere:
    """Finds no upstream library, whether it is installed or not."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] in UPSTREAM:
            raise ModuleNotFoundError(f"{name} is not for tests/pure", name=name)
        return None


@pytest.fixture(autouse=True)
def only_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests of other folders may have imported them before, in this process.
    for name in [name for name in sys.modules if name.partition(".")[0] in UPSTREAM]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotHere, *sys.meta_path])
