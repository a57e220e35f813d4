"""`hp-plugin patch` on trees made here: it goes by the hashes of the files, whatever release a tree claims to be."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from hp_plugin.commands import main as cli
from hp_plugin.megatron_lm import patch as patching
from hp_plugin.megatron_lm.patch import PATCH, Patch
from hp_plugin.megatron_lm.releases import listed_releases

ROOT = Path(__file__).parents[2]
ORIGINAL = "".join(f"line{number} = {number}\n" for number in range(1, 19))
INSTALLS = "import hp_plugin.megatron_lm.hooks; hp_plugin.megatron_lm.hooks.install()\n"
HOOKED = "megatron/core/parallel_state.py"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree whose file is the one that the patch is made for."""
    made_for = Patch.read()
    first = {made_for.file: sha(ORIGINAL), HOOKED: sha("first\n")}
    releases = {"core_v0.0.1": first, "core_v0.0.2": {made_for.file: sha(ORIGINAL), HOOKED: sha("second\n")}}
    ours = Patch(made_for.file, made_for.after_line, made_for.added, releases)
    monkeypatch.setattr(Patch, "read", classmethod(lambda cls, path=PATCH: ours))
    (tmp_path / made_for.file).parent.mkdir(parents=True)
    (tmp_path / made_for.file).write_text(ORIGINAL)
    (tmp_path / "megatron/core").mkdir()
    (tmp_path / HOOKED).write_text("first\n")
    (tmp_path / "megatron/core/package_info.py").write_text("MAJOR = 9\nMINOR = 8\nPATCH = 7\n")
    return tmp_path


def file(tree: Path) -> Path:
    return tree / Patch.read().file


def run(*words: object) -> int:
    return cli.main(["patch", *map(str, words)])


def test_the_shipped_patch_is_two_lines_for_the_trees_of_the_one_list() -> None:
    shipped = Patch.read()
    assert shipped.added == "\n" + INSTALLS
    assert shipped.file == "megatron/training/__init__.py"
    assert list(shipped.releases) == list(dict.fromkeys(row.tree for row in listed_releases() if row.tree))
    assert all(len(files) == 6 and shipped.file in files for files in shipped.releases.values())
    assert (ROOT / "patches" / PATCH.name).read_bytes() == PATCH.read_bytes()


def test_the_shipped_patch_holds_no_line_of_anyone_else() -> None:
    body = PATCH.read_text().split("@@\n")[1]
    assert all(line.startswith("+") for line in body.splitlines())


def test_apply_check_revert(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file(tree).chmod(0o640)
    assert run(tree, "--check") == 1
    assert run(tree) == 0
    assert file(tree).read_text() == f"{ORIGINAL}\n{INSTALLS}"
    assert file(tree).stat().st_mode & 0o777 == 0o640
    assert run(tree, "--check") == 0
    assert run(tree, "--revert") == 0
    assert file(tree).read_text() == ORIGINAL
    assert run(tree, "--check") == 1
    said = capsys.readouterr().out
    assert "core_v0.0.1" in said and "core_v0.0.2" not in said


def test_twice_is_once(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tree) == run(tree) == 0
    assert file(tree).read_text().count(INSTALLS) == 1
    assert "patched already" in capsys.readouterr().out
    assert run(tree, "--revert") == run(tree, "--revert") == 0
    assert file(tree).read_text() == ORIGINAL


def test_lines_of_an_earlier_release_are_exchanged_and_taken_out(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (earlier,) = patching.EARLIER
    file(tree).write_text(ORIGINAL + earlier)
    assert run(tree, "--check") == 0
    assert run(tree) == 0
    assert file(tree).read_text() == f"{ORIGINAL}\n{INSTALLS}"
    file(tree).write_text(ORIGINAL + earlier)
    assert run(tree, "--revert") == 0
    assert file(tree).read_text() == ORIGINAL
    assert "patched already" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["one more line\n", "\n" + INSTALLS + "# and more\n"])
@pytest.mark.parametrize("flags", [[], ["--check"], ["--revert"]])
def test_another_tree_is_refused_and_left_alone(
    tree: Path, change: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file(tree).write_text(ORIGINAL + change)
    assert run(tree, *flags) == 2
    assert file(tree).read_text() == ORIGINAL + change
    said = capsys.readouterr().err
    assert f"Closest is core_v0.0.1, from which differ: {Patch.read().file}" in said and "core_v0.0.2" in said
    # What the tree calls itself is told, and believed by nobody.
    assert "Megatron-Core 9.8.7" in said


def test_the_hooked_files_decide_too(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / HOOKED).write_text("second\n")
    assert run(tree) == 0
    assert "core_v0.0.2" in capsys.readouterr().out
    # Changed after patching: our lines still come out, but do not go in again.
    (tree / HOOKED).write_text("third\n")
    assert run(tree, "--revert") == 0
    assert file(tree).read_text() == ORIGINAL
    assert run(tree) == 2
    assert f"from which differ: {HOOKED}" in capsys.readouterr().err
    assert file(tree).read_text() == ORIGINAL


def test_no_tree_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 2
    assert "not the root of a Megatron-LM tree" in capsys.readouterr().err


def test_an_interrupt_leaves_the_old_file(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(patching.os, "replace", interrupted)
    assert run(tree) == cli.INTERRUPTED
    assert file(tree).read_text() == ORIGINAL
    assert [path.name for path in file(tree).parent.iterdir()] == [file(tree).name]


@pytest.mark.skipif("MEGATRON_LM_DIR" not in os.environ, reason="MEGATRON_LM_DIR names no clone of Megatron-LM")
@pytest.mark.parametrize(
    ("tag", "fits"),
    [
        *((tag, True) for tag in dict.fromkeys(row.tree for row in listed_releases() if row.tree)),
        *((tag, False) for tag in ("core_v0.14.0", "core_v0.17.0", "core_v0.18.0")),
    ],
)
def test_every_release_it_is_made_for(tag: str, fits: bool, tmp_path: Path) -> None:
    path = Patch.read().file
    shown = {file: show(tag, file) for files in Patch.read().releases.values() for file in files}
    for name, content in shown.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert run(tmp_path) == (0 if fits else 2)
    compile((tmp_path / path).read_text(), path, "exec")
    assert (tmp_path / path).read_bytes() == shown[path] + (Patch.read().added.encode() if fits else b"")
    assert run(tmp_path, "--revert") == 0 or not fits
    assert {name: (tmp_path / name).read_bytes() for name in shown} == shown


def show(tag: str, file: str) -> bytes:
    git = ["git", "-C", os.environ["MEGATRON_LM_DIR"], "show", f"{tag}:{file}"]
    return subprocess.run(git, capture_output=True, check=True).stdout
