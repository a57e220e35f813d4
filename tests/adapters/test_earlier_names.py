"""Names of release 0.1 go on working, and say what they are called now."""

import subprocess
import sys

import pytest

CASES = {
    "hp_plugin.cost": ("hp_plugin.planner", "make_plan"),
    "hp_plugin.megatron_adapter.launch": ("hp_plugin.launch", "main"),
    "hp_plugin.megatron_adapter.hooks": ("hp_plugin.megatron_lm.hooks", "install"),
}


@pytest.mark.parametrize("earlier", CASES)
def test_an_earlier_name_is_the_new_one_with_a_warning(earlier: str) -> None:
    now, name = CASES[earlier]
    code = (
        "import importlib, warnings\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        f"    old = importlib.import_module({earlier!r})\n"
        f"new = importlib.import_module({now!r})\n"
        f"assert old.{name} is new.{name}\n"
        "print([str(one.message) for one in said if one.category is DeprecationWarning])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count(f"{earlier} is {now} now") == 1


def test_the_earlier_launcher_runs_and_warns() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hp_plugin.megatron_adapter.launch", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "hp_plugin.launch SCRIPT" in done.stderr and "DeprecationWarning" in done.stderr
