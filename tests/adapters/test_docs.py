"""What the pages show to DeepSpeed, and the page that `hp-plugin compare --into` writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hp_plugin.compare.report.page import BEGIN, END, load_reports, tables
from hp_plugin.deepspeed_adapter.config import head_dim_option

ROOT = Path(__file__).parents[2]


def test_every_grid_in_json_is_one() -> None:
    shown = [
        found
        for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for found in re.findall(r'\{"head_dim_parallel": \{.*?\}\}', page.read_text("utf-8"))
    ]
    assert len(shown) > 1
    assert all(head_dim_option(json.loads(text)) is not None for text in shown)


def test_the_tables_are_those_of_the_reports() -> None:
    page = (ROOT / "docs/compare/tables.md").read_text("utf-8")
    between = page.partition(BEGIN)[2].partition(END)[0]
    assert between.strip() == tables(load_reports(ROOT / "docs/compare")).strip()
