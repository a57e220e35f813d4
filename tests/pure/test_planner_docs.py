"""The tables in docs/planner.md are what the commands print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hp_plugin.commands import plan as plan_cli
from hp_plugin.planner.inputs.models import presets
from hp_plugin.planner.machine.hardware import shipped
from hp_plugin.planner.reports import long_context, reproduce, validate

DOCS = (Path(__file__).parents[2] / "docs" / "planner.md").read_text(encoding="utf-8")
BLOCKS = [block.splitlines() for block in re.findall(r"```text\n(.*?)\n```", DOCS, flags=re.DOTALL)]


def stripped(lines: list[str]) -> list[str]:
    return [line.rstrip() for line in lines]


def test_the_validation_table_is_current() -> None:
    assert stripped(BLOCKS[0]) == stripped(validate.validation_report(validate.compare_all()))


def test_the_table_of_mixtures_is_current() -> None:
    assert stripped(BLOCKS[1]) == stripped(validate.bridge_report())


@pytest.mark.slow
def test_the_reproduction_tables_are_current() -> None:
    assert stripped(BLOCKS[2]) == stripped(reproduce.reproduction_report())


@pytest.mark.slow
def test_the_table_of_public_models_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_cli.main(["--suite", "kv-heads"]) == 0
    assert stripped(BLOCKS[3]) == stripped(capsys.readouterr().out.splitlines())


def test_a_case_of_long_contexts_is_current() -> None:
    found = long_context.case_lines(long_context.case("llama3-405b", "h100-ib", 131_072))
    at = stripped(BLOCKS[4]).index(found[0])
    assert stripped(BLOCKS[4])[at : at + len(found)] == stripped(found)


@pytest.mark.slow
def test_the_table_of_long_contexts_is_current() -> None:
    assert stripped(BLOCKS[4]) == stripped(long_context.long_context_report())


def test_commands_in_the_docs_name_what_exists() -> None:
    for hardware in re.findall(r"--hardware ([\w-]+)", DOCS):
        assert hardware in shipped() or hardware == "FILE", hardware
    for model in re.findall(r"--model ([\w.-]+)", DOCS):
        assert model in presets(), model
