"""Reads the signatures that tests/te_stub stands in for out of a clone of Transformer Engine.

python tools/te_signatures.py CLONE v2.2 v2.9 v2.18 > tests/te_stub/transformer_engine/signatures.json
"""

import ast
import json
import subprocess
import sys

# class or function -> the files that it has been in, and its methods
WANTED = {
    "Linear": (["module/linear.py"], ["__init__", "forward"]),
    "LayerNormLinear": (["module/layernorm_linear.py"], ["__init__", "forward"]),
    "LayerNorm": (["module/layernorm.py"], ["__init__"]),
    "RMSNorm": (["module/rmsnorm.py"], ["__init__"]),
    "DotProductAttention": (
        ["attention/dot_product_attention/dot_product_attention.py", "attention.py"],
        ["__init__", "forward"],
    ),
    "apply_rotary_pos_emb": (["attention/rope.py", "dot_product_attention/rope.py"], []),
    "fp8_autocast": (["fp8.py", "quantization.py"], []),
}


def source(clone: str, tag: str, path: str) -> str | None:
    """A file of a tag, or None where it has none."""
    command = ["git", "-C", clone, "show", f"{tag}:transformer_engine/pytorch/{path}"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout if found.returncode == 0 else None


def parameters(function: ast.FunctionDef) -> list[tuple[str, bool]]:
    """(name, whether it has a default) of each, but `self`."""
    names = [argument.arg for argument in function.args.args]
    defaults = len(function.args.defaults)
    listed = [(name, number >= len(names) - defaults) for number, name in enumerate(names)]
    listed += [
        (argument.arg, default is not None)
        for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    ]
    return [pair for pair in listed if pair[0] != "self"]


def signatures(clone: str, tag: str) -> dict[str, list[tuple[str, bool]]]:
    """By "class.method" or function."""
    found: dict[str, list[tuple[str, bool]]] = {}
    for wanted, (paths, methods) in WANTED.items():
        for text in (text for path in paths if (text := source(clone, tag, path)) is not None):
            for node in ast.parse(text).body:
                if getattr(node, "name", None) != wanted:
                    continue
                if isinstance(node, ast.FunctionDef):
                    found[wanted] = parameters(node)
                for method in node.body if isinstance(node, ast.ClassDef) else []:
                    if isinstance(method, ast.FunctionDef) and method.name in methods:
                        found[f"{wanted}.{method.name}"] = parameters(method)
    return found


if __name__ == "__main__":
    clone, *tags = sys.argv[1:]
    # A line for each: what a release changes can be seen in a diff.
    print("{")
    for number, tag in enumerate(tags):
        rows = [f"  {json.dumps(name)}: {json.dumps(listed)}" for name, listed in signatures(clone, tag).items()]
        print(f'"{tag.removeprefix("v")}": {{\n' + ",\n".join(rows) + ("\n}" if number + 1 == len(tags) else "\n},"))
    print("}")
