"""The command with which a shell script starts a training, read without running anything."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from hp_plugin.planner.inputs.bash import matching_bracket, shell_words

_ASSIGNMENT = re.compile(
    r"(?:export\s+|local\s+|declare\s+(?:-\w+\s+)*|readonly\s+)?([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL
)
_FUNCTION = re.compile(r"(?:function\s+)?[A-Za-z_][\w-]*\s*\(\)\s*\{?\s*$")
_MARK = re.compile(r"(?:^|/)pretrain_\w*\.py$")
"""Scripts whose flags are Megatron-LM's."""
_DEPTH = 5
"""Scripts that call scripts, at most."""


def launch_words(text: str) -> list[str]:
    """The words of the launch: of a command line as it is, or of the one in a script (`script.sh arguments ...`).

    Raises:
        ValueError: there is no such file, or no command or several that start a pretrain script.
    """
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise ValueError(f"--from-launch: {error}") from None
    words = words[1:] if words[:1] in (["bash"], ["sh"]) else words
    if not words:
        raise ValueError("--from-launch: a command line or a script's path, got nothing")
    path = Path(words[0])
    if len(words) == 1 and not path.is_file() and not _starts(words):
        raise ValueError(f"--from-launch {words[0]}: no such file, and no command line that starts pretrain_gpt.py")
    if not path.is_file() or path.suffix == ".py":
        if not _starts(words):
            raise ValueError("--from-launch: the command line starts no pretrain_gpt.py")
        return words
    found = _of_script(path, words[1:], 0)
    if not found:
        raise ValueError(
            f"--from-launch {path}: no command in it that starts pretrain_gpt.py (functions and loops are not "
            "followed); give the command line itself"
        )
    if len({" ".join(each) for each in found}) > 1:
        raise ValueError(f"--from-launch {path}: {len(found)} launches in it; give the command line of one")
    return found[0]


def _starts(words: Sequence[str]) -> bool:
    return any(_MARK.search(word) for word in words)


def _of_script(path: Path, arguments: Sequence[str], depth: int) -> list[list[str]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"--from-launch {path}: {error.strerror}") from None
    variables: dict[str, list[str]] = {str(number): [word] for number, word in enumerate(arguments, start=1)}
    variables |= {"@": list(arguments), "*": list(arguments), "#": [str(len(arguments))], "0": [str(path)]}
    found: list[list[str]] = []
    for statement in _followed(_statements(text), variables):
        assigned = _ASSIGNMENT.fullmatch(statement)
        if assigned:
            _assign(variables, assigned)
            continue
        words = shell_words(statement, variables)
        words = [word for word in words if word not in ("exec", "set", "time", "nohup")]
        if _starts(words):
            found.append(words)
        elif depth < _DEPTH:
            found += _called(path.parent, words, depth)
    return found


def _called(folder: Path, words: Sequence[str], depth: int) -> list[list[str]]:
    """The launches of a script beside this one that a command runs."""
    for at, word in enumerate(words):
        if word.endswith(".sh") and (folder / Path(word).name).is_file():
            return _of_script(folder / Path(word).name, words[at + 1 :], depth + 1)
    return []


def _assign(variables: dict[str, list[str]], found: re.Match[str]) -> None:
    name, more, value = found.groups()
    value = value.strip()
    if value.startswith("("):
        values = shell_words(value[1 : value.rfind(")")], variables)
    else:
        values = [" ".join(shell_words(value, variables))]
    if not more:
        variables[name] = values
    elif value.startswith("("):
        variables[name] = [*variables.get(name, ()), *values]
    else:
        variables[name] = ["".join((*variables.get(name, ()), *values))]


def _statements(text: str) -> Iterator[str]:
    """Statements of a script: continued lines joined, arrays whole, `;` and line ends between them."""
    held = ""
    for line in text.replace("\\\n", " ").splitlines():
        # Within an array every line is words; comments end there, not at its bracket.
        held = f"{held}\n{line}" if held else line
        if _open(held):
            continue
        yield from _split(held)
        held = ""
    if held.strip():
        yield from _split(held)


def _open(text: str) -> bool:
    """Whether an array's bracket or a quote is still open."""
    depth, quote, at = 0, "", 0
    while at < len(text):
        character = text[at]
        if quote:
            if character == "\\" and quote == '"':
                at += 1
            elif quote == '"' and text.startswith("$(", at):
                try:
                    at = matching_bracket(text, at + 1, "(", ")")
                except ValueError:
                    return True
            elif character == quote:
                quote = ""
        elif character in "'\"":
            quote = character
        elif character == "#" and (at == 0 or text[at - 1] in " \t\n(;"):
            at = text.find("\n", at)
            if at < 0:
                break
        elif character in "()":
            depth += 1 if character == "(" else -1
        at += 1
    return bool(quote) or (depth > 0 and "=(" in text)


def _split(text: str) -> Iterator[str]:
    """Statements between `;` and `&&` that stand outside quotes, brackets and conditions."""
    if "=(" in text or re.match(r"\s*(case|for|while)\b", text):
        yield text.strip()
        return
    piece, quote, depth = "", "", 0
    at = 0
    while at < len(text):
        character = text[at]
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "({[":
            depth += 1
        elif character in ")}]":
            depth -= 1
        elif character == "#" and (at == 0 or text[at - 1] in " \t"):
            break
        elif character == ";" and depth <= 0 and text[at : at + 2] != ";;":
            yield piece.strip()
            piece, at = "", at + 1
            continue
        piece, at = piece + character, at + 1
    yield piece.strip()


def _followed(statements: Iterator[str], variables: dict[str, list[str]]) -> Iterator[str]:
    """Statements that run: branches by their condition, none where only running would tell; no functions, no loops."""
    branches: list[list[bool]] = []  # of every open `if`: whether this branch runs, whether one has run
    for statement in statements:
        running = all(branch[0] for branch in branches)
        word = statement.split(None, 1)[0] if statement.split() else ""
        if word == "if":
            branches.append([_true(statement[2:], variables), False])
        elif word == "elif" and branches:
            taken = branches[-1][0] or branches[-1][1]
            branches[-1] = [not taken and _true(statement[4:], variables), taken]
        elif word == "else" and branches:
            branches[-1] = [not (branches[-1][0] or branches[-1][1]), True]
            if statement[4:].strip() and running:
                yield statement[4:].strip()
        elif word in ("fi", "done", "esac", "}") or statement.startswith("}"):
            if branches:
                branches.pop()
        elif word in ("for", "while", "until") or _FUNCTION.match(statement):
            branches.append([False, True])
        elif word == "case":
            chosen = statement.partition(" in")[0][4:]
            branches.append([running, True])
            subject = " ".join(shell_words(chosen, variables))
            variables["case"] = [subject]
        elif re.match(r"\(?[^()\s]+\)\s", f"{statement} ") and branches and "case" in variables:
            pattern, _, body = statement.lstrip("(").partition(")")
            subject = variables["case"][0]
            if all(branch[0] for branch in branches[:-1]) and any(
                fnmatch(subject, one.strip().strip("'\"")) for one in pattern.split("|")
            ):
                yield body.strip().removesuffix(";;").strip()
                del variables["case"]  # the first that fits is the only one
        elif running:
            body = statement.removeprefix("then").strip() if word == "then" else statement
            if body and body != ";;":
                yield body


def _true(condition: str, variables: dict[str, list[str]]) -> bool:
    """Whether a condition of comparisons of words holds; what it cannot tell does not."""
    text = condition.strip().removesuffix("then").strip().rstrip(";").strip()
    either = [part for part in re.split(r"\|\|", text)]
    return any(all(_test(each, variables) for each in re.split(r"&&", part)) for part in either)


def _test(text: str, variables: dict[str, list[str]]) -> bool:
    inside = text.strip().strip("[]").strip()
    negated = inside.startswith("!")
    inside = inside.lstrip("! ")
    if inside.startswith(("-z", "-n")):
        empty = not "".join(shell_words(inside[2:], variables))
        return (empty == inside.startswith("-z")) != negated
    compared = re.fullmatch(r"(.*?)\s(==|=|!=)\s(.*)", inside)
    if compared is None:
        return False
    left, right = (" ".join(shell_words(side, variables)) for side in (compared[1], compared[3]))
    return (fnmatch(left, right) != (compared[2] == "!=")) != negated
