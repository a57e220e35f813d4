"""One word, one thing: what the names in the package may and may not be."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hp_plugin"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Both names are Python's own for where a program begins.
MAIN = "main"


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def functions(path: Path) -> set[str]:
    return {node.name for node in tree(path).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_is_named_as_a_function_in_it(path: Path) -> None:
    assert path.stem == MAIN or path.stem not in functions(path)


def test_files_are_split_before_300_lines() -> None:
    assert not [path for path in MODULES if len(path.read_text("utf-8").splitlines()) >= 300]


@pytest.mark.parametrize("name", ["head_dim_spec", "load_model"])
def test_a_function_that_many_look_for_is_one_function(name: str) -> None:
    assert len([path for path in MODULES if name in functions(path)]) <= 1


def test_help_is_complete_where_docstrings_are_left_out() -> None:
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                words = [*node.args, *(keyword.value for keyword in node.keywords)]
                assert not [
                    part
                    for word in words
                    for part in ast.walk(word)
                    if isinstance(part, ast.Name) and part.id == "__doc__"
                ], f"{path}:{node.lineno} passes a docstring on, which python -OO leaves out"
