"""setup.py, the pins, the built wheel and the set-up script agree with each other and with the package."""

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import hp_plugin
from hp_plugin.commands import doctor

ROOT = Path(__file__).parents[2]
PINS_FILE = ROOT / "tests" / "requirements.txt"
PINS = [Requirement(text) for line in PINS_FILE.read_text("utf-8").splitlines() if (text := line.split("#")[0].strip())]


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    handed: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", handed.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return handed


def ranges(metadata: dict[str, Any]) -> dict[str, SpecifierSet]:
    """Distribution -> the range that setup.py declares, required and optional parts together."""
    extras = [entry for entries in metadata["extras_require"].values() for entry in entries]
    declared = [Requirement(entry) for entry in [*metadata["install_requires"], *extras]]
    return {requirement.name: requirement.specifier for requirement in declared}


def test_the_version_has_one_source(metadata: dict[str, Any]) -> None:
    assert metadata["version"] == hp_plugin.__version__
    assert hp_plugin.__version__ not in (ROOT / "setup.py").read_text("utf-8")
    assert "[project]" not in (ROOT / "pyproject.toml").read_text("utf-8")


def test_every_pin_is_exact_and_lies_in_the_declared_range(metadata: dict[str, Any]) -> None:
    declared = ranges(metadata)
    for pin in PINS:
        (clause,) = pin.specifier
        assert clause.operator == "==" and "*" not in clause.version, f"{pin} is not exact"
        assert declared.get(pin.name, SpecifierSet()).contains(clause.version), f"{pin} is outside {declared[pin.name]}"
    assert set(declared) <= {pin.name for pin in PINS}, "a declared part has no pin to be tested with"


def test_the_doctor_knows_the_declared_ranges(metadata: dict[str, Any]) -> None:
    declared = ranges(metadata) | {"python": SpecifierSet(metadata["python_requires"])}
    assert {name: SpecifierSet(known) for name, known in doctor.KNOWN.items()} == {
        name: declared[name] for name in doctor.KNOWN
    }


def test_one_pin_of_each_part_applies_to_this_python() -> None:
    applying = [pin.name for pin in PINS if pin.marker is None or pin.marker.evaluate()]
    assert sorted(applying) == sorted({pin.name for pin in PINS})


def test_the_console_script_resolves(metadata: dict[str, Any]) -> None:
    (script,) = metadata["entry_points"]["console_scripts"]
    name, _, target = script.partition(" = ")
    module, _, function = target.partition(":")
    assert name == "hp-plugin"
    assert callable(getattr(import_module(module), function))


def test_the_wheel_holds_the_whole_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "hp_plugin", source / "hp_plugin", ignore=ignored)
    shutil.copytree(ROOT / "tests" / "pure", source / "tests" / "pure", ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, source)
    expected = {path.relative_to(source).as_posix() for path in (source / "hp_plugin").rglob("*") if path.is_file()}
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)]
    done = subprocess.run([sys.executable, *build, str(source)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert inside == expected
        about = {name.partition(".dist-info/")[2] for name in archive.namelist()} - {""}
        assert {"entry_points.txt", "METADATA", "licenses/LICENSE"} <= about
    assert wheel.name.startswith(f"hp_plugin-{hp_plugin.__version__}-")


def script(*command: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path} if path else dict(os.environ)
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


def test_unmet_pins_are_named(tmp_path: Path) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("# pins\npytest==0.1  # old\nno-such-part==1.0\nsetuptools==1.0; python_version < '3'\n", "utf-8")
    done = script(sys.executable, "tools/check_pins.py", str(pins))
    assert done.returncode == 1
    wanted, missing = done.stderr.splitlines()
    assert wanted == f"pytest==0.1 is wanted, {pytest.__version__} is there"
    assert missing == "no-such-part==1.0 is missing"


def test_a_local_build_meets_the_pin_of_its_public_version(tmp_path: Path) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text(f"pytest=={pytest.__version__}\n", "utf-8")
    assert script(sys.executable, "tools/check_pins.py", str(pins)).returncode == 0
    torch = next(pin for pin in PINS if pin.name == "torch").specifier
    assert torch.contains(f"{next(iter(torch)).version}+cpu")


def test_the_set_up_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    done = script("bash", "tools/setup_env.sh", "--pyhton", "python3")
    assert done.returncode == 2
    assert "unknown option --pyhton; there are --venv DIR, --python PATH and --megatron-core VERSION" in done.stderr
    done = script("bash", "tools/setup_env.sh", "--venv", str(tmp_path / "venv"), "--python", "no-such-python")
    assert done.returncode == 2
    assert "--python no-such-python is not a program" in done.stderr


def test_another_megatron_core_gets_an_environment_that_all_checkouts_share(tmp_path: Path) -> None:
    offline = {
        "XDG_CACHE_HOME": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
    }
    words = ["bash", "tools/setup_env.sh", "--megatron-core", "0.0.1", "--python", sys.executable]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | offline | {"XDG_CACHE_HOME": str(tmp_path)},
        timeout=120,
    )
    # Nothing can be installed here; what would be, and where, is said before.
    assert done.returncode == 2 and "Run the same command again" in done.stderr
    home = tmp_path / "hp-plugin" / "megatron-core-0.0.1-python{}.{}".format(*sys.version_info[:2])
    pins = (home / "pins.txt").read_text("utf-8").splitlines()
    assert [pin for pin in pins if pin.startswith("megatron-core")] == ["megatron-core==0.0.1"]
    others = [pin for pin in pins if not pin.startswith(("megatron-core", "#"))]
    assert others == [line for line in PINS_FILE.read_text("utf-8").splitlines() if not line.startswith(("mega", "#"))]


def test_the_set_up_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1"\nexit 1\n', "utf-8")
    old.chmod(0o755)
    done = script("bash", "tools/setup_env.sh", "--venv", str(tmp_path / "venv"), "--python", str(old))
    assert done.returncode == 2
    assert f"needs Python 3.10 or newer, and {old} is Python 3.9.1" in done.stderr
    assert done.stdout == ""


def test_the_set_up_says_what_it_looked_at_when_there_is_no_python(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "mkdir", "flock"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    done = script("bash", "tools/setup_env.sh", "--venv", str(tmp_path / "venv"), path=str(tools))
    assert done.returncode == 2
    assert "looked at: nothing named python3 on PATH" in done.stderr
