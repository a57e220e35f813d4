"""Nobody outside `exchange/` asks which exchange it is: what depends on that is a fact of the exchange's own rule."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hp_plugin.exchange.rules import RULES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hp_plugin"
EXCHANGE = PACKAGE / "exchange"
FOLDERS = {path.parent.name for path in EXCHANGE.glob("*/rule.py")}
# What `auto` stands for is `exchange/`'s to say; as a default it is a choice for users, like any other value.
AUTO = "auto"
# The registry's names for single choices: also these are asked about in `exchange/` alone.
CONSTANTS = {"AUTO", "IDENTITY", "AUTO_ORDER"}
# Methods of a string that answer a question about it, or find something by it.
QUESTIONS = {"startswith", "endswith", "find", "index", "count", "match", "fullmatch", "search", "get", "pop"}

# Literals that are an exchange's name and mean something else, or that say what is measured: module, the expression
# around the literal, how often.
OTHER_MEANINGS = {
    # layouts to be measured or planned
    ("hp_plugin.compare.entries.suites", "('sequence', 'scores', 'local')"): 3,
    ("hp_plugin.planner.reports.kv_heads", "('batch', 'sequence')"): 2,
    ("hp_plugin.planner.reports.kv_heads", "('batch',)"): 1,
    ("hp_plugin.planner.reports.long_context", "('batch', 'sequence')"): 2,
    ("hp_plugin.planner.reports.reproduce", "('batch', 'weights')"): 2,
    # Megatron-Core's own layers, and the rates of their kernels
    ("hp_plugin.training.option_groups", "('local', 'transformer_engine')"): 1,
    ("hp_plugin.training.option_groups", "option('local', 'layer implementation', choices=IMPLEMENTATIONS)"): 1,
    ("hp_plugin.training.option_groups", "('flash', 'fused', 'unfused', 'local', 'auto')"): 1,
    ("hp_plugin.compare.report.markdown", "backend == 'auto'"): 1,
    ("hp_plugin.training.checks", "config.transformer_impl == 'local'"): 1,
    ("hp_plugin.training.moe", "config.transformer_impl == 'local'"): 1,
    ("hp_plugin.training.transformer", "config.transformer_impl == 'local'"): 1,
    ("hp_plugin.planner.inputs.megatron_launch", "given.transformer_impl != 'local'"): 1,
    ("hp_plugin.megatron_lm.flags", "args.transformer_impl != 'local'"): 1,
    ("hp_plugin.compare.entries.planned", "config.transformer_impl == 'local'"): 1,
    ("hp_plugin.compare.rates.machine", "['local']"): 1,
    ("hp_plugin.compare.rates.machine", "{'local': ...}"): 1,
    # what memory is taken by
    ("hp_plugin.planner.counts.feasibility", "{'weights': ...}"): 1,
    ("hp_plugin.planner.reports.text", "('weights', 'gradients', 'optimizer', 'activations', 'buffers', 'cache')"): 1,
    # axes and lengths; what a product or a column is called
    ("hp_plugin.bench.gpu.machine_file", "['batch', 'm', 'n', 'k', 'tflops']"): 1,
    ("hp_plugin.compare.rates.machine", "['batch', 'm', 'n', 'k', 'tflops']"): 1,
    ("hp_plugin.planner.machine.gemm", "('batch', 'm', 'n', 'k')"): 1,
    ("hp_plugin.planner.counts.core_attention", "Gemm('scores', queries, keys, width, batch)"): 1,
    ("hp_plugin.planner.reports.kv_heads", "'context' if mode == 'decode' else 'sequence'"): 1,
    ("hp_plugin.planner.reports.reproduce", "'context' if mode == 'decode' else 'sequence'"): 1,
    ("hp_plugin.planner.reports.reproduce", "f'{'local'}'"): 1,
}


def described(node: ast.AST) -> str:
    """One line of source for an expression; of a dictionary only the keys that are exchanges' names."""
    if isinstance(node, ast.Dict):
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant) and key.value in {*RULES, AUTO}]
        return "{" + ", ".join(f"{key!r}: ..." for key in keys) + "}"
    if isinstance(node, ast.FormattedValue):
        return f"f'{{{ast.unparse(node.value)}}}'"
    return ast.unparse(node)


def is_exchange(node: ast.AST) -> bool:
    """Whether an expression reads an exchange's name out of something: `exchange`, `grid.exchange`, `exchange_name`."""
    called = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    if called == "name" and isinstance(node, ast.Attribute):
        return is_exchange(node.value)
    return called == called.lower() and "exchange" in called.split("_")


def mentions_exchange(node: ast.AST) -> bool:
    return any(is_exchange(inner) for inner in ast.walk(node))


def has_text(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Constant) and isinstance(inner.value, str) for inner in ast.walk(node))


def choices(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and source of everything that names an exchange, compares with its name or picks one by it."""
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for parent in ast.walk(tree):
        for child in ast.iter_child_nodes(parent):
            if isinstance(child, ast.Constant) and child.value in RULES and id(child) not in documentation:
                yield child.lineno, described(parent)
        match parent:
            case ast.Compare() if any(
                (isinstance(inner, ast.Constant) and inner.value == AUTO)
                or (isinstance(inner, ast.Name) and inner.id in CONSTANTS)
                or (isinstance(inner, ast.Attribute) and inner.attr in CONSTANTS)
                for inner in ast.walk(parent)
            ):
                yield parent.lineno, described(parent)
            case ast.Compare() if mentions_exchange(parent) and has_text(parent) and not named(parent):
                yield parent.lineno, described(parent)
            case ast.Match() if mentions_exchange(parent.subject) and any(has_text(case) for case in parent.cases):
                yield parent.lineno, f"match {ast.unparse(parent.subject)}"
            case ast.Subscript() if isinstance(parent.slice, ast.Constant) and parent.slice.value == AUTO:
                yield parent.lineno, described(parent)
            case ast.Call(func=ast.Attribute(attr=method), args=args) if method in QUESTIONS:
                if mentions_exchange(parent) and any(map(has_text, args)) and not named(parent):
                    yield parent.lineno, described(parent)
            case ast.Call(func=ast.Name("getattr"), args=[_, what, *_]) if mentions_exchange(what):
                yield parent.lineno, described(parent)
            case ast.Call(func=ast.Name("dict"), keywords=keywords):
                if any(keyword.arg in RULES for keyword in keywords):
                    yield parent.lineno, described(parent)
            case ast.ImportFrom(module=str(module)) | ast.Import(names=[ast.alias(name=module)]):
                if module.split(".")[:2] == ["hp_plugin", "exchange"] and FOLDERS & set(module.split(".")[2:3]):
                    yield parent.lineno, described(parent)


def named(node: ast.AST) -> bool:
    """Whether an exchange's own name stands in the expression, which is reported by itself."""
    return any(isinstance(inner, ast.Constant) and inner.value in {*RULES, AUTO} for inner in ast.walk(node))


def test_no_module_outside_exchange_asks_which_exchange_it_is() -> None:
    found: Counter[tuple[str, str]] = Counter()
    places = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.is_relative_to(EXCHANGE):
            continue
        for line, source in choices(ast.parse(path.read_text("utf-8"))):
            found[module, source] += 1
            if (module, source) not in OTHER_MEANINGS:
                places.append(f"{path.relative_to(ROOT)}:{line}: {source}")
    assert not places, "ask the exchange's rule or strategy instead:\n" + "\n".join(places)
    assert found == OTHER_MEANINGS, "what stands there no longer is to go from OTHER_MEANINGS"


PLANTED = [
    "if exchange == 'scores': pass",
    "if 'scores' != self.head_dim.exchange: pass",
    "ok = name in ('sequence', 'scores')",
    "ok = name not in {'local'}",
    "ok = head_dim.exchange == 'auto'",
    "ok = exchange not in ('auto', other)",
    "ok = exchange == AUTO",
    "ok = exchange not in (rules.AUTO, other)",
    "ok = exchange in AUTO_ORDER",
    "ok = self.exchange != IDENTITY",
    "match name:\n    case 'batch' | 'sequence': pass",
    "match exchange:\n    case 'auto': pass",
    "match exchange:\n    case str() if exchange == 'local': pass",
    "rule = RULES['scores']",
    "rule = RULES.get('scores')",
    "rule = STRATEGIES['auto']",
    "share = {'batch': b // n, 'sequence': b}[name]",
    "share = dict(batch=b // n, other=b)[name]",
    "ok = exchange.startswith('s')",
    "ok = layout.grid.exchange.endswith('ch')",
    "ok = exchange[0] == 's'",
    "ok = 'q' in head_dim_exchange",
    "ok = self.turn.exchange.name == 'ba' + 'tch'",
    "ok = re.fullmatch('s.*', exchange)",
    "run = getattr(self, f'_{exchange}')",
    "def chosen(): return 'batch'",
    "def chosen(exchange='local'): pass",
    "chosen = HeadDimConfig(2, 2, 'sequence')",
    "search = Search(exchange='batch')",
    "SCORES = 'scores'",
    "from hp_plugin.exchange.scores.rule import ScoresRule",
    "import hp_plugin.exchange.batch.strategy",
]
HARMLESS = [
    "'''batch'''\ndef f():\n    '''local'''\nclass A:\n    '''scores'''",
    "if exchange is None: pass",
    "if old.exchange != new.exchange: pass",
    "if exchange not in EXCHANGES: pass",
    "rule = RULES[exchange]",
    "def parse(text, exchange='auto'): pass",
    "given = getattr(arguments, 'head_dim_exchange', None) or 'auto'",
    "said = f'--head-dim-exchange {exchange}'",
    "from hp_plugin.exchange.rules import RULES, resolve",
    "from hp_plugin.exchange.masks import causal_mask",
    "ok = layout.startswith('grid=')",
]


@pytest.mark.parametrize("code", PLANTED)
def test_every_way_of_asking_is_found(code: str) -> None:
    assert list(choices(ast.parse(code)))


@pytest.mark.parametrize("code", HARMLESS)
def test_what_is_no_question_about_the_name_is_left_alone(code: str) -> None:
    assert not list(choices(ast.parse(code)))
