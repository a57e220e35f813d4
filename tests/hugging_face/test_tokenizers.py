"""Generation with a Hugging Face tokenizer that lies on this machine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from hp_plugin.generation.tokenizers import find_tokenizer

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None,
    reason="NOT CHECKED against transformers: pip install -r tests/hugging_face/requirements.txt",
)

TEXT = "def naïve(x):\n    return {'€': x, 'ab': [1, 2]}\n"


def made(folder: Path) -> str:
    """A small byte-pair tokenizer of this very text, with a token that ends a text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=270, special_tokens=["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>").save_pretrained(folder)
    return str(folder)


def test_tokens_become_the_text_as_they_come(tmp_path: Path) -> None:
    tokenizer = find_tokenizer(made(tmp_path))
    tokens, stream = tokenizer.encode(TEXT), tokenizer.stream()
    assert tokenizer.end == 0 and 10 < len(tokens) < len(TEXT.encode())
    shown = [stream.feed(token) for token in tokens]
    assert "".join(shown) + stream.rest() == TEXT
    # A character of several tokens comes with the last of them, never as a replacement that is taken back.
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in shown)


def test_nothing_is_fetched_for_a_name_that_is_not_here() -> None:
    with pytest.raises(ValueError, match="--tokenizer nobody/nothing is no tokenizer on this machine"):
        find_tokenizer("nobody/nothing")
