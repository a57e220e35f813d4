"""What generation is made of, on one process: choosing tokens, text as it comes, the page, options and prompts."""

import argparse
import io
import json
from pathlib import Path

import pytest
import torch

from hp_plugin.generation.decoding import Step, check_prompts
from hp_plugin.generation.options import GenerationOptions, add_arguments, read_options
from hp_plugin.generation.printing import Page
from hp_plugin.generation.sampler import Sampler
from hp_plugin.generation.sampling import Sampling
from hp_plugin.generation.tokenizers import ByteTokenizer, find_tokenizer

LIKELY = torch.log(torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]]))


def drawn(how: Sampling, times: int = 400) -> list[int]:
    sampler = Sampler(how, 1)
    return [token for _ in range(times) for token in sampler.pick(LIKELY, [True]) if token is not None]


def test_greedy_takes_the_most_likely() -> None:
    assert set(drawn(Sampling(), 3)) == {1}


def test_frequencies_are_the_probabilities() -> None:
    tokens = drawn(Sampling(temperature=1.0), 4000)
    for token, share in enumerate((0.1, 0.4, 0.05, 0.25, 0.2)):
        # Four standard deviations of a share of 4000 draws.
        assert abs(tokens.count(token) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


@pytest.mark.parametrize(
    ("how", "left"),
    [
        (Sampling(temperature=1.0, top_k=2), {1, 3}),
        (Sampling(temperature=1.0, top_k=9), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1.0, top_p=0.4), {1}),
        (Sampling(temperature=1.0, top_p=0.6), {1, 3}),
        (Sampling(temperature=1.0, top_p=0.86), {0, 1, 3, 4}),
        (Sampling(temperature=1.0, top_k=3, top_p=0.6), {1, 3}),
        (Sampling(temperature=0.01), {1}),
    ],
    ids=str,
)
def test_only_what_is_left_is_drawn(how: Sampling, left: set[int]) -> None:
    assert set(drawn(how)) == left


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    how = Sampling(temperature=1.0, seed=5)
    alone, among = Sampler(how, 1), Sampler(how, 3)
    rows = LIKELY.expand(3, -1)
    among.pick(rows, [False, True, True])  # the first is still in its prompt, and draws nothing
    for _ in range(20):
        assert alone.pick(LIKELY, [True])[0] == among.pick(rows, [True, True, False])[0]
    assert drawn(how, 50) == drawn(how, 50) != drawn(Sampling(temperature=1.0, seed=6), 50)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -1.0}, "--temperature must be at least 0"),
        ({"temperature": float("nan")}, "--temperature must be at least 0"),
        ({"top_k": -1}, "--top-k must be at least 0"),
        ({"top_p": 0.0}, "--top-p must be above 0"),
        ({"seed": 2**31}, "--seed must be at least 0 and below"),
    ],
)
def test_what_sampling_cannot_be_is_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_characters_come_when_their_last_byte_does() -> None:
    stream = ByteTokenizer().stream()
    assert [stream.feed(token) for token in ByteTokenizer().encode("aé€")] == ["a", "", "é", "", "", "€"]
    assert stream.feed(0xE2) == "" and stream.rest() == "\N{REPLACEMENT CHARACTER}"


def test_a_tokenizer_that_is_not_there_is_said() -> None:
    with pytest.raises(ValueError, match="--tokenizer /nowhere"):
        find_tokenizer("/nowhere")


@pytest.mark.parametrize(
    ("prompts", "new", "positions", "said"),
    [
        ([], 4, None, "there is no prompt"),
        ([[1], []], 4, None, "prompt 2 is empty"),
        ([[1], [3, 300]], 4, None, "prompt 2 has the token 300, and the model knows 0 to 256"),
        ([[1, 2]], 0, None, "--max-new-tokens must be at least 1, got 0"),
        ([[1] * 10], 7, 16, "10 tokens and 7 new ones do not fit into the 16 positions .* --max-new-tokens 6"),
    ],
)
def test_prompts_that_cannot_be_gone_on_with(
    prompts: list[list[int]], new: int, positions: int | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_prompts(prompts, new, 257, positions)


def test_a_prompt_that_fits_exactly() -> None:
    assert check_prompts([[1], [1] * 10], 6, 257, 16) == 16


def page(*steps: tuple[int | None, ...], prompts: tuple[str, ...] = ("a", "b"), new: int = 3) -> tuple[str, list[str]]:
    """What is on the page in the end, and after each step."""
    out, grown = io.StringIO(), []
    with Page(prompts, ByteTokenizer(), new, out) as shown:
        for number, tokens in enumerate(steps):
            shown.step(Step(tokens, 0.5, number == 0))
            grown.append(out.getvalue())
    return out.getvalue(), grown


def test_the_topmost_text_grows_and_the_others_wait() -> None:
    x, y, z = b"xyz"
    whole, grown = page((x, x), (y, 256), (z, None))
    assert grown[0] == "== 1 of 2\nax" and grown[1] == "== 1 of 2\naxy"
    assert whole == grown[2] == "== 1 of 2\naxyz\n== 2 of 2\nbx\n"


def test_a_page_that_is_left_early_shows_what_there_is() -> None:
    x, y, _ = b"xyz"
    assert page((x, y))[0] == "== 1 of 2\nax\n== 2 of 2\nby\n"
    assert page((x,), prompts=("a",))[0] == "ax\n"
    assert page(prompts=("a",))[0] == "a\n"


def test_speed_leaves_the_prompt_out_of_the_time_per_token() -> None:
    with Page(("a",), ByteTokenizer(), 3, io.StringIO()) as shown:
        for number in range(3):
            shown.step(Step((1,), (2.0, 0.25, 0.75)[number], number == 0))
    assert (
        str(shown.speed) == "3 tokens in 3.00 s: 1.0 tokens/s; prompts 2.00 s, then 500.00 ms per output token (TPOT)"
    )


def options(*words: str) -> GenerationOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_options(parser.parse_args(["--load", "x", *words]))


def test_prompts_come_from_arguments_files_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert options("--prompt", "a", "b c").prompts == ("a", "b c")
    (tmp_path / "one.txt").write_text("x\ny\n")
    (tmp_path / "many.json").write_text(json.dumps(["p", "q"]))
    assert options("--prompt-file", str(tmp_path / "one.txt")).prompts == ("x\ny\n",)
    assert options("--prompt-file", str(tmp_path / "many.json")).prompts == ("p", "q")
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert options().prompts == ("from a pipe",)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is no JSON"), ("[]", "must be a list of texts"), ("[1]", "of texts")]
)
def test_a_file_of_prompts_that_is_none(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        options("--prompt-file", str(tmp_path / "prompts.json"))
    with pytest.raises(ValueError, match="cannot be read"):
        options("--prompt-file", str(tmp_path / "nothing.txt"))
