"""The one list of releases, and that the pages, the ranges and the patch say what it says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from hp_plugin.megatron_lm.patch import Patch
from hp_plugin.megatron_lm.releases import (
    CHECKED,
    NOT_TRIED,
    RUN,
    Release,
    known,
    listed_releases,
    ranges,
    standing,
    table,
    with_table,
)

ROOT = Path(__file__).parents[2]
PAGES: dict[str, bool] = runpy.run_path(str(ROOT / "tools" / "write_releases.py"))["PAGES"]


def test_every_row_says_what_was_done_and_no_more() -> None:
    for row in listed_releases():
        assert row.state in (RUN, CHECKED, NOT_TRIED), row
        told = (row.what, row.beside, row.command)
        assert all(told) if row.state == RUN else not any(told), row
        # What is said to have been run can be run again from a checkout.
        assert not row.command or re.search(r"bash tests/run\.sh|bash examples/quickstart\.sh", row.command), row
    pairs = [(row.megatron_core, row.python) for row in listed_releases()]
    assert len(pairs) == len(set(pairs))


def test_the_ranges_end_where_running_ended() -> None:
    allowed = SpecifierSet(ranges()["megatron-core"])
    assert all(allowed.contains(release) for release in known())
    untried = {row.megatron_core for row in listed_releases()} - set(known())
    assert not any(allowed.contains(release) for release in untried)
    python = SpecifierSet(ranges()["python"])
    assert all(python.contains(row.python) for row in listed_releases())


def test_the_patch_knows_the_trees_of_the_list() -> None:
    assert set(Patch.read().releases) == {row.tree for row in listed_releases() if row.tree}


def test_an_installed_pair_finds_its_row() -> None:
    assert standing("0.16.1", "3.11.7").state == RUN
    assert str(standing("0.16.1", "3.11.7")).startswith("run: all tests")
    assert standing("0.16.1", "3.9") == Release("0.16.1", "3.9", NOT_TRIED)
    assert str(standing("0.1.0", "3.11.7")) == NOT_TRIED


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_the_table_as_it_is_made(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    assert with_table(text, PAGES[page]) == text, "run python tools/write_releases.py"


def test_the_table_has_a_line_for_every_row() -> None:
    lines = table(commands=True).splitlines()
    assert len(lines) == 2 + len(listed_releases())
    assert len({line.count("|") for line in lines}) == 1
    assert sum("`MEGATRON" in line or "`bash" in line for line in lines) == sum(
        row.state == RUN for row in listed_releases()
    )
    tried = [row for row in listed_releases() if row.state != NOT_TRIED]
    assert len(table(commands=False).splitlines()) == 2 + len(tried)


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="releases: begin"):
        with_table("# A page", commands=False)
