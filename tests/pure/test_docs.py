"""The pages name what exists (files, links, modules, options, versions) and repeat what the reports and floors say."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import hp_plugin
from hp_plugin.commands import main as commands
from tests.pure.test_imports import FLOORS

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs/compare/tables.md"]
}
README, ARCHITECTURE = PAGES["README.md"], PAGES["docs/architecture.md"]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# What a command writes, and what is Megatron-LM's.
NOT_OURS = {"runs/quickstart/losses.png", "tools/checkpoint/convert.py"}


def test_the_readme_can_be_read_in_one_go() -> None:
    assert README.count("\n") <= 150


@pytest.mark.parametrize("page", PAGES)
def test_every_internal_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", PAGES[page])):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page} links to {target}"


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_is_named_exists(page: str) -> None:
    # In a page about the house paths may start at a room; elsewhere they start at the root.
    rooms = [ROOT, ROOT / "hp_plugin", ROOT / "hp_plugin/planner"]
    whole_house = page in ("README.md", "CONTRIBUTING.md", "docs/architecture.md")
    for path in re.findall(r"`((?:\.ci|[a-z_]{3,})/[\w.*/-]*)`", PAGES[page]):
        starts_at_root = path.split("/")[0] in {child.name for child in ROOT.iterdir() if child.is_dir()}
        if path in NOT_OURS or not (whole_house or starts_at_root):
            continue
        path = re.sub(r"\b[A-Z]{3,}\b", "*", path)  # NAME stands for any
        assert any(list(room.glob(path)) for room in rooms), f"{page} names {path}"


def test_the_readme_maps_every_folder_of_the_package() -> None:
    folders = {path.parent for path in (ROOT / "hp_plugin").glob("*/*.py")}
    for folder in folders:
        earlier = "old name" in (folder / "__init__.py").read_text("utf-8")
        assert earlier or f"`hp_plugin/{folder.name}/`" in README, f"README has no line about hp_plugin/{folder.name}/"


def test_contributing_names_every_folder_of_tests() -> None:
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/test_*.py")}
    assert not [folder for folder in folders if f"`tests/{folder}/`" not in PAGES["CONTRIBUTING.md"]]


def test_the_architecture_has_every_room_on_its_floor() -> None:
    rows = re.findall(r"^\| (\d) \| (.*?) \|", ARCHITECTURE, re.MULTILINE)
    told = {int(floor): set(re.findall(r"`(\w+)`", rooms)) for floor, rooms in rows}
    held = {floor: {room.split(".")[0] for step in steps for room in step} for floor, steps in FLOORS.items()}
    assert told == held


def names(page: str) -> Iterator[str]:
    """Every dotted name of ours on a page, but for the first column of tables of earlier names."""
    earlier = False
    for line in PAGES[page].splitlines():
        earlier = line.startswith("|") and (earlier or line.startswith("| earlier "))
        yield from re.findall(r"\bhp_plugin(?:\.\w+)+", line.split("|", 2)[-1] if earlier else line)


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_ours_is_there(page: str) -> None:
    for name in names(page):
        parts = name.split(".")
        if parts[-1] in ("py", "json"):
            continue
        place = next(k for k in range(len(parts), 0, -1) if module(parts[:k]) is not None)
        assert len(parts) - place <= 1, f"{page} names {name}: there is no module {'.'.join(parts[: place + 1])}"
        assert parts[place:] == [] or parts[-1] in defined(parts[:place]), f"{page} names {name}"


def module(parts: list[str]) -> Path | None:
    """The file of a module, read rather than imported: most of them need torch."""
    path = ROOT.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def defined(parts: list[str]) -> set[str]:
    """What a module defines or imports at its top level."""
    path = module(parts)
    assert path is not None
    if parts == ["hp_plugin"]:
        return set(hp_plugin.__all__)
    found: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def shown_commands() -> Iterator[tuple[str, list[str]]]:
    """Every whole `hp-plugin ...` command in a code block; those with dots for "and so on" are not whole."""
    for page, text in PAGES.items():
        for _, block in BLOCK.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip().startswith("hp-plugin ") and "..." not in line:
                    yield page, shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize(
    ("page", "words"), list(shown_commands()), ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_the_command_line_takes_every_command_that_is_shown(page: str, words: list[str]) -> None:
    commands.build_parser(words[0]).parse_args(words)


def test_commands_are_found() -> None:
    assert len(list(shown_commands())) > 10


def test_contributing_says_when_each_hook_can_go() -> None:
    said = " ".join(PAGES["CONTRIBUTING.md"].split())
    reasons = {reason for path in (ROOT / "hp_plugin").rglob("*.py") for reason in hook_ends(path)}
    assert len(reasons) > 10
    assert not [reason for reason in reasons if reason not in said]


def hook_ends(path: Path) -> Iterator[str]:
    """The `until` of every `Hook` that a module makes."""
    tree = ast.parse(path.read_text("utf-8"))
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Hook":
            given = [keyword.value for keyword in node.keywords if keyword.arg == "until"] or node.args[3:4]
            yield constants[given[0].id] if isinstance(given[0], ast.Name) else ast.literal_eval(given[0])


def test_the_newest_version_is_this_one() -> None:
    newest = re.findall(r"^## \[(.+?)\]", PAGES["CHANGELOG.md"], re.MULTILINE)[0]
    cited = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert [newest, *cited] == [hp_plugin.__version__] * 2


def test_the_rows_of_measurements_in_the_readme_are_the_reports() -> None:
    rows = re.findall(r"^\| `(\S+?)`, .* \| `(\S+)` \| `(\S+)` \| (\S+) \| (\S+) \| (\S+) \|$", README, re.MULTILINE)
    assert len(rows) == 5
    for model, stock, grid, *told in rows:
        report = json.loads((ROOT / "docs/compare" / model / "report.json").read_text("utf-8"))
        base, mine = (report["modes"]["train"][layout] for layout in (stock, grid))
        found = [mine[key]["median"] / base[key]["median"] for key in ("tokens_per_s", "tpot_ms")]
        found.append(sum(mine["sent_bytes_per_token"].values()) / sum(base["sent_bytes_per_token"].values()))
        assert told == [f"{ratio:.2f}" for ratio in found], model


def test_the_predictions_in_the_readme_are_those_of_the_planners_page() -> None:
    (table,) = re.findall(
        r"^Tensor parallelism beyond heads.*?^```", PAGES["docs/planner.md"], re.MULTILINE | re.DOTALL
    )
    train, decode = table.split("\ndecode: ")
    columns = re.compile(r"^\S+ +\d+ +\d+ +\d+ +(\d+) .* +(-|\d\.\d\d) +(?:-|\d\.\d\d) +(\d\.\d\d) +\S+$", re.MULTILINE)
    same = [float(ratio) for _, ratio, _ in columns.findall(train) if ratio != "-"]
    best = [float(ratio) for _, _, ratio in columns.findall(train)]
    node = [float(ratio) for size, ratio, _ in columns.findall(decode) if size == "8" and ratio != "-"]
    assert len(same) > 5 and len(best) > 5 and len(node) > 1
    said = " ".join(README.split())
    assert f"predicted to train {min(same):.2f} to {max(same):.2f} times as fast as stock at the same TP size" in said
    assert f"reaches {min(best):.2f} to {max(best):.2f} of the best stock layout" in said
    assert (
        f"8 GPUs of one node is {1 - max(node):.0%}".rstrip("%") in said
        and f"to {1 - min(node):.0%}".rstrip("%") in said
    )
