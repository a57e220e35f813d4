"""Puts the plugin's lines into a Megatron-LM tree, and takes them out again; what a tree is, its hashes decide.

Standard library only: a tree can be patched where torch is not installed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

PATCH = Path(__file__).with_name("megatron_lm.patch")
EARLIER = ("\nimport hp_plugin.megatron_adapter.hooks; hp_plugin.megatron_adapter.hooks.install()\n",)
"""What earlier releases of the plugin put in: 0.1."""


@dataclass(frozen=True)
class Patch:
    """One insertion into one file: the added lines, where they go, and the trees they are made for."""

    file: str
    after_line: int
    added: str
    releases: dict[str, dict[str, str]]
    """Release -> file -> its SHA-256 there, unpatched."""

    @classmethod
    def read(cls, path: Path = PATCH) -> Patch:
        """Reads a zero-context unified diff of one hunk, with `# release` and `# sha256 HASH FILE` lines before it."""
        text = path.read_text("utf-8")
        blocks = re.findall(r"^# release (\S+)\n((?:# sha256 .*\n)+)", text, re.MULTILINE)
        releases = {
            release: {file: sha for sha, file in re.findall(r"^# sha256 ([0-9a-f]{64}) (\S+)$", block, re.MULTILINE)}
            for release, block in blocks
        }
        file = re.search(r"^\+\+\+ b/(\S+)$", text, re.MULTILINE)
        hunk = re.search(r"^@@ -(\d+),0 \+\d+,\d+ @@\n((?:\+.*\n)+)\Z", text, re.MULTILINE)
        assert file is not None and hunk is not None and releases, f"{path} is no patch of one insertion"
        added = "".join(line[1:] for line in hunk[2].splitlines(keepends=True))
        return cls(file[1], int(hunk[1]), added, releases)

    def put_in(self, content: bytes) -> bytes:
        """The file with the lines in it."""
        lines = content.splitlines(keepends=True)
        return b"".join([*lines[: self.after_line], self.added.encode(), *lines[self.after_line :]])

    def taken_out(self, content: bytes) -> bytes | None:
        """The file without the lines, ours or an earlier release's, or None if they are not where this puts them."""
        lines = content.splitlines(keepends=True)
        for added in (self.added, *EARLIER):
            end = self.after_line + added.count("\n")
            if b"".join(lines[self.after_line : end]) == added.encode():
                return b"".join([*lines[: self.after_line], *lines[end:]])
        return None


@dataclass(frozen=True)
class Tree:
    """A Megatron-LM directory as it was found: its file, that file without our lines, and what it is a release of."""

    path: Path
    content: bytes
    original: bytes
    release: str

    @property
    def patched(self) -> bool:
        """Whether our lines are in it."""
        return self.content != self.original


def examine(directory: Path, patch: Patch, reverting: bool = False) -> Tree:
    """Reads a tree and decides by hashes whether it is one the patch is made for, patched or not.

    Args:
        reverting: only the file with our lines counts; others may have changed since they were put in.

    Raises:
        ValueError: it is not; names the release it is closest to, and the files that differ from it.
    """
    path = directory / patch.file
    if not path.is_file():
        raise ValueError(f"{directory} is not the root of a Megatron-LM tree: it has no {patch.file}")
    content = path.read_bytes()
    without = patch.taken_out(content)
    tree = Tree(path, content, content if without is None else without, "")
    differing = {
        release: [file for file, sha in files.items() if _sha(directory, file, tree) != sha]
        for release, files in patch.releases.items()
    }
    if reverting:
        differing = {release: [file for file in files if file == patch.file] for release, files in differing.items()}
    closest = min(differing, key=lambda release: len(differing[release]))
    if not differing[closest]:
        return replace(tree, release=closest)
    raise ValueError(
        f"{directory} is none of the trees the patch is made for ({', '.join(patch.releases)}). Closest is {closest}, "
        f"from which differ: {', '.join(differing[closest])}{' (our own lines aside)' if tree.patched else ''}. The "
        f"tree calls itself {_version(directory)}. Check one of these releases out, unchanged; or leave the tree as "
        "it is and start its scripts with hp_plugin.launch, which replaces functions, not text"
    )


def _sha(directory: Path, file: str, tree: Tree) -> str | None:
    """SHA-256 of one file, our lines left out; None if it is not there."""
    path = directory / file
    if path == tree.path:
        return hashlib.sha256(tree.original).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def apply(directory: Path, patch: Patch) -> str:
    """Patches a tree, in one step or not at all; returns what was done."""
    tree = examine(directory, patch)
    patched = patch.put_in(tree.original)
    if tree.content == patched:
        return f"{tree.path} is patched already ({tree.release})"
    _replace(tree.path, patched)
    return f"patched {tree.path} ({tree.release}): python pretrain_gpt.py --head-dim-parallel m,n works in this tree"


def revert(directory: Path, patch: Patch) -> str:
    """Takes our lines out, in one step or not at all; returns what was done."""
    tree = examine(directory, patch, reverting=True)
    if not tree.patched:
        return f"{tree.path} is not patched ({tree.release})"
    _replace(tree.path, tree.original)
    return f"restored {tree.path} ({tree.release})"


def _replace(path: Path, content: bytes) -> None:
    """Exchanges a file for another content; whoever reads it, or interrupts this, sees the one or the other."""
    target = path.resolve()
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(target, name)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _version(directory: Path) -> str:
    """What the tree calls itself; only for messages, since released trees carry wrong numbers too."""
    try:
        text = (directory / "megatron/core/package_info.py").read_text("utf-8")
    except OSError:
        return "no release at all (it has no megatron/core/package_info.py)"
    numbers = re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)$", text, re.MULTILINE)
    return f"Megatron-Core {'.'.join(numbers)}"
