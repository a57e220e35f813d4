"""examples/plot_losses.py: the table, the largest difference, the tolerance, the picture and the mistakes."""

import json
import math
import runpy
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "plot_losses.py"))
main: Callable[[list[str]], int] = SCRIPT["main"]
shown: Callable[[list[int]], list[int]] = SCRIPT["shown"]


@pytest.fixture
def curve(tmp_path: Path) -> Callable[..., str]:
    def write(name: str, losses: dict[int, float]) -> str:
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(losses), "utf-8")
        return f"{name}={file}"

    return write


def test_the_largest_difference_and_where_it_is(curve: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    stock = curve("stock", {1: 5.5, 2: 4.0, 3: 3.0})
    grid = curve("grid", {1: 5.5, 2: 4.25, 3: 2.875})
    assert main([stock, grid]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["iteration", "stock", "grid"]
    assert [line.split() for line in lines[1:4]] == [
        ["1", "5.500000", "5.500000"],
        ["2", "4.000000", "4.250000"],
        ["3", "3.000000", "2.875000"],
    ]
    assert lines[4] == "largest difference of grid from stock: 2.5e-01 (iteration 2 of 3)"


@pytest.mark.parametrize(("tolerance", "status"), [("0.25", 0), ("0.2", 1)])
def test_the_tolerance_decides_the_status(
    tolerance: str, status: int, curve: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    near, far = curve("near", {1: 5.0, 2: 4.0}), curve("far", {1: 5.0, 2: 4.25})
    assert main([near, far, "--tolerance", tolerance]) == status
    assert capsys.readouterr().err == (f"further than {tolerance} from near: far\n" if status else "")


def test_a_loss_that_is_not_a_number_is_never_near(curve: Callable[..., str]) -> None:
    assert main([curve("a", {1: 5.0, 2: 4.0}), curve("b", {1: math.nan, 2: 4.0}), "--tolerance", "1e9"]) == 1


def test_only_common_iterations_are_compared(curve: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([curve("a", {1: 5.0, 2: 4.0, 3: 0.0}), curve("b", {2: 4.0, 4: 1.0}), "--tolerance", "0"]) == 0
    assert "(iteration 2 of 2)" in capsys.readouterr().out


def test_rows_stand_at_round_numbers_with_both_ends() -> None:
    assert shown(list(range(1, 201))) == [1, *range(20, 201, 20)]
    assert shown(list(range(1, 8))) == [1, 2, 3, 4, 5, 6, 7]
    assert shown(list(range(1, 24))) == [1, 5, 10, 15, 20, 23]
    assert shown([7]) == [7]


def test_the_picture_is_drawn(curve: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png = tmp_path / "new" / "losses.png"
    assert main([curve("a", {1: 5.0, 2: 4.0}), curve("b", {1: 5.0, 2: 4.1}), "--png", str(png)]) == 0
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (960, 720)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("not json", "is not a loss file"), ("[1]", "is not a loss file"), ("{}", "no iteration")],
)
def test_a_bad_file_is_refused(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "losses.json"
    if content is not None:
        file.write_text(content, "utf-8")
    with pytest.raises(SystemExit) as end:
        main([f"name={file}"])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_curves_that_cannot_be_compared_are_refused(
    curve: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = curve("one", {1: 5.0}), curve("other", {2: 5.0})
    for words, message in [([one, other], "no iteration in common"), ([one, one], "the same name")]:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
        assert message in capsys.readouterr().err
