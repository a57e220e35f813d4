"""Megatron-LM's own, unmodified gpt_static_inference.py through the launcher, on grids, against itself on one rank."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hp_plugin.training.corpus import build_corpus
from tests.adapters.megatron_lm_runs import COMMON, needs_clone, release_tree, run

pytestmark = [
    needs_clone,
    pytest.mark.skipif(
        importlib.util.find_spec("tiktoken") is None,
        reason="the script needs a tokenizer with a beginning: pip install tiktoken",
    ),
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]

SCRIPT = "examples/inference/gpt/gpt_static_inference.py"
MODEL = f"""{COMMON.replace("--mock-data", "")}
    --group-query-attention --num-query-groups 2 --init-method-std 0.3 --max-position-embeddings 64 --vocab-size 264
    --tokenizer-type TikTokenizer --tiktoken-pattern v2 --tiktoken-num-special-tokens 8 --tokenizer-model bytes.json
"""
# No padding, so that every token has a text: 264 = 8 · 33.
ONE, FOUR = "--make-vocab-size-divisible-by 8", "--make-vocab-size-divisible-by 2"
GENERATE = (
    "--load saved --num-tokens-to-generate 20 --inference-max-seq-length 64 --incoming-requests-per-sec -1 "
    "--prompts 'ab c' 'def foo' --output-path out.json"
)


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    """A release with a tokenizer of bytes, and a checkpoint of one rank of stock in it."""
    folder = release_tree("core_v0.16.1", Path(tempfile.mkdtemp(prefix="core_v0.16.1")))
    tokens = [
        {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": str(byte)}
        for byte in range(256)
    ]
    (folder / "bytes.json").write_text(json.dumps(tokens))
    data = build_corpus(folder / "data", sorted(Path(build_corpus.__code__.co_filename).parent.glob("*.py")))
    flags = f"{ONE} --data-path {data} --split 100,0,0 --save saved --save-interval 7 --lr 1e-6 --min-lr 0"
    status, output = run(folder, 1, flags, launcher=False, common=MODEL)
    assert status == 0, output[-6000:]
    yield folder
    shutil.rmtree(folder)


def texts(tree: Path, ranks: int, flags: str) -> list[tuple[str, list[int]]]:
    """What the script writes of each prompt: the text and its tokens."""
    status, output = run(tree, ranks, f"{GENERATE} {flags}", script=SCRIPT, common=MODEL)
    assert status == 0, output[-6000:]
    found: dict[str, dict[str, Any]] = json.loads((tree / "out.json").read_text())
    return [(one["generated_text"], one["generated_tokens"]) for one in found.values()]


def test_grids_write_what_one_rank_writes(tree: Path) -> None:
    expected = texts(tree, 1, f"{ONE} --use-legacy-static-engine")
    assert [len(tokens) for _, tokens in expected] == [20, 20]
    # Two prompts: whole sequences on 2 x 2, blocks of tokens on 1 x 4. The default engine goes over to static batches.
    for flags in ("--head-dim-parallel 2,2 --use-legacy-static-engine", "--head-dim-parallel 1,4"):
        assert texts(tree, 4, f"{FOUR} {flags}") == expected
