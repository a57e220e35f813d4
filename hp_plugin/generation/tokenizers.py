"""Text to tokens and back as they come: bytes, as the reference trainer reads its default data, or Hugging Face's."""

from __future__ import annotations

import codecs
from importlib.util import find_spec
from typing import Any, Protocol

from hp_plugin.training.option_groups import BYTE_VOCABULARY

BYTES = "bytes"


class Stream(Protocol):
    """One sequence's tokens on their way to text."""

    def feed(self, token: int) -> str:
        """The text that is complete with this token."""

    def rest(self) -> str:
        """What the last tokens left open."""


class Tokenizer(Protocol):
    """What generation needs of a tokenizer; `end` is the token that ends a text."""

    end: int | None

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""

    def stream(self) -> Stream:
        """For one sequence."""


class ByteTokenizer:
    """One token per byte of UTF-8, and one for the end of a document."""

    end: int | None = BYTE_VOCABULARY

    def encode(self, text: str) -> list[int]:
        """Its bytes."""
        return list(text.encode())

    def stream(self) -> Stream:
        """Characters of several bytes come when their last byte does; bytes that are none become U+FFFD."""
        return _ByteStream()


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(bytes([token])) if token < BYTE_VOCABULARY else "\N{REPLACEMENT CHARACTER}"

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)


class HuggingFaceTokenizer:
    """A tokenizer of `transformers` that is on this machine already; nothing is fetched.

    Raises:
        ValueError: transformers is not installed, or there is no such tokenizer.
    """

    def __init__(self, name: str) -> None:
        if find_spec("transformers") is None:
            raise ValueError(f"--tokenizer {name} needs the package transformers, which is not installed")
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as missing:
            raise ValueError(f"--tokenizer {name} is no tokenizer on this machine: {missing}") from missing
        self.end: int | None = self._tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Without tokens that a template would put around it."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def stream(self) -> Stream:
        """Text is shown once no later token can change it."""
        return _HuggingFaceStream(self._tokenizer)


class _HuggingFaceStream:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._tokens, self._shown = tokenizer, [], 0

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._new(text)

    def rest(self) -> str:
        return self._new(self._tokenizer.decode(self._tokens)) if self._tokens else ""

    def _new(self, text: str) -> str:
        new, self._shown = text[self._shown :], len(text)
        return new


def find_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or a folder or name of a Hugging Face tokenizer on this machine.

    Raises:
        ValueError: there is none.
    """
    return ByteTokenizer() if name == BYTES else HuggingFaceTokenizer(name)
