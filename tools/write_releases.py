"""Writes the tables of releases in README.md and docs/megatron_lm.md anew from hp_plugin/megatron_lm/releases.json."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hp_plugin.megatron_lm.releases import with_table  # noqa: E402

PAGES = {"README.md": False, "docs/megatron_lm.md": True}  # page -> whether the commands are shown

if __name__ == "__main__":
    for name, commands in PAGES.items():
        page = ROOT / name
        page.write_text(with_table(page.read_text("utf-8"), commands), "utf-8")
