"""Words of a shell line with its variables put in: the part of bash that launch scripts use, nothing executed."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Mapping, Sequence

UNKNOWN = "…"
"""Stands for what only running the script would tell, such as a command's output."""

_KEPT = "\0"
"""A space that splits no word."""
_NAME = re.compile(r"[A-Za-z_]\w*|\d+|[@#*?]")
_ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip

Variables = Mapping[str, Sequence[str]]
"""Values by name: one word, or an array's; `1`, `2`, ... are a script's arguments and `@` all of them."""


def shell_words(line: str, variables: Variables) -> list[str]:
    """The words of a line after expansion, quotes taken off; a comment ends it.

    Raises:
        ValueError: a quote or brace that does not end.
    """
    found: list[str] = []
    word: str | None = None
    at = 0
    while at < len(line):
        character = line[at]
        if character in " \t\n":
            found += [] if word is None else [word]
            word, at = None, at + 1
        elif character == "#" and word is None:
            at = line.find("\n", at) if "\n" in line[at:] else len(line)
        elif character == "'":
            end = _end(line, at, "'")
            word, at = (word or "") + line[at + 1 : end], end + 1
        elif character == '"':
            end = _end(line, at, '"')
            pieces = _quoted(line[at + 1 : end], variables)
            # "${array[@]}" is as many words as the array has, the first and last joined to what touches them.
            for piece in pieces[:-1]:
                found.append((word or "") + piece)
                word = None
            if pieces:
                word = (word or "") + pieces[-1]
            at = end + 1
        elif character == "\\":
            word, at = (word or "") + line[at + 1 : at + 2], at + 2
        elif character == "$":
            values, at = _expansion(line, at, variables)
            split = [part.replace(_KEPT, " ") for value in values for part in value.split()]
            for part in split[:-1]:
                found.append((word or "") + part)
                word = None
            if split:
                word = (word or "") + split[-1]
        else:
            word, at = (word or "") + character, at + 1
    return found + ([] if word is None else [word])


def _end(line: str, start: int, quote: str) -> int:
    at = start + 1
    while at < len(line):
        if line[at] == "\\" and quote == '"':
            at += 1
        elif quote == '"' and line.startswith("$(", at):
            at = matching_bracket(line, at + 1, "(", ")")
        elif line[at] == quote:
            return at
        at += 1
    raise ValueError(f"a {quote} does not end: {line[start : start + 40]}")


def _quoted(text: str, variables: Variables) -> list[str]:
    """The pieces of a double-quoted text: one, but where an array is in it."""
    pieces = [""]
    at = 0
    while at < len(text):
        if text[at] == "\\" and at + 1 < len(text):
            pieces[-1], at = pieces[-1] + text[at + 1].replace("\n", ""), at + 2
        elif text[at] == "$":
            values, at = _expansion(text, at, variables, quoted=True)
            if not values and text.strip().startswith("$") and at >= len(text):
                return []
            for number, value in enumerate(values):
                pieces = [*pieces, value] if number else [*pieces[:-1], pieces[-1] + value]
        else:
            pieces[-1], at = pieces[-1] + text[at], at + 1
    return pieces


def _expansion(text: str, start: int, variables: Variables, quoted: bool = False) -> tuple[Sequence[str], int]:
    """The value of what begins with `$` at `start`, and where it ends."""
    if text.startswith("$((", start):
        end = text.find("))", start)
        return [_arithmetic(text[start + 3 : end], variables)], _closed(text, start, end) + 2
    if text.startswith("$(", start):
        return [UNKNOWN], matching_bracket(text, start + 1, "(", ")") + 1
    if text.startswith("${", start):
        end = matching_bracket(text, start + 1, "{", "}")
        values = _braced(text[start + 2 : end], variables)
        return ([value.replace(_KEPT, " ") for value in values] if quoted else values), end + 1
    name = _NAME.match(text, start + 1)
    if name is None:
        return ["$"], start + 1
    return variables.get(name[0], ()), name.end()


def _closed(text: str, start: int, end: int) -> int:
    if end < 0:
        raise ValueError(f"an expansion does not end: {text[start : start + 40]}")
    return end


def matching_bracket(text: str, start: int, opening: str, closing: str) -> int:
    """Where the bracket that opens at `start` is closed.

    Raises:
        ValueError: it is not.
    """
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == opening) - (text[at] == closing)
        if depth == 0:
            return at
    raise ValueError(f"an expansion does not end: {text[start : start + 40]}")


def _braced(inside: str, variables: Variables) -> Sequence[str]:
    """`NAME`, `NAME[@]`, `NAME:-default` (or `=`, `?`, `+`) and `@:from:count`."""
    name = _NAME.match(inside)
    if name is None:
        return [UNKNOWN]
    rest = inside[name.end() :].removeprefix("[@]").removeprefix("[*]")
    values = variables.get(name[0], ())
    slice_ = re.fullmatch(r":\s*(\d+)(?::\s*(\d+))?", rest)
    if slice_ and name[0] == "@":
        first = int(slice_[1]) - 1
        return values[first : first + int(slice_[2])] if slice_[2] else values[first:]
    default = re.match(r":?([-=?+])", rest)
    if default:
        given = any(values)
        if given and default[1] != "+":
            return values
        if default[1] == "?":
            return [UNKNOWN]
        words = shell_words(rest[default.end() :], variables) if given == (default[1] == "+") else []
        # What is quoted within stays one word where the whole is split.
        return [" ".join(word.replace(" ", _KEPT) for word in words)] if words else []
    return values if not rest else [UNKNOWN]


def _arithmetic(text: str, variables: Variables) -> str:
    """Sums and products of integers and variables."""
    plain = re.sub(r"\$?\{?([A-Za-z_]\w*|\d+)\}?", lambda found: _integer(found[1], variables), text)
    try:
        return str(_value(ast.parse(plain.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError):
        return UNKNOWN


def _integer(name: str, variables: Variables) -> str:
    if name.isdigit():
        return name
    return " ".join(variables.get(name, ("0",)))


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return int(_ARITHMETIC[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError("no integer")
