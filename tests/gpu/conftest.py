"""Runs these tests where there is a GPU, says in one line where there is none, or rehearses them on the CPU."""

from __future__ import annotations

import pytest

FEW = "kept"
"""Marks the tests that a rehearsal keeps: one of each kind, on tiny sizes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="run one GPU test of each kind on the CPU")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{FEW}: of the GPU tests, runs in a rehearsal on the CPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if "tests/gpu/" in item.path.as_posix()]
    if not mine or has_gpu():
        return
    rehearsed = config.getoption("--rehearse", default=False)
    for item in mine:
        if not (rehearsed and item.get_closest_marker(FEW)):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    skipped = [one for one in terminalreporter.stats.get("skipped", []) if "tests/gpu/" in one.nodeid]
    if skipped and not has_gpu():
        rest = "; a rehearsal ran on the CPU" if config.getoption("--rehearse", default=False) else ""
        terminalreporter.write_line(
            f"NO GPU: {len(skipped)} tests of tests/gpu were not run{rest}", red=True, bold=True
        )


def has_gpu() -> bool:
    """Whether torch sees one; where torch is not installed there is none."""
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return bool(torch.cuda.is_available())
