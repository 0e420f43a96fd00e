"""README: its example runs as it is printed, its commands exist, and its numbers are those of the pages it names."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import doodl_fast
from doodl_fast import shapes

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
LOADING = "pipe = diffusers."
NUMBER = r"(?<![\d.])(\d+(?:\.\d+)?)(%?)"


def example() -> list[str]:
    """Returns the code of the first Python block after the line that begins with "On your own"."""
    block = README.read_text().split("\nOn your own", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    return [line for line in block.splitlines() if line]


def measured() -> list[list[str]]:
    """Returns the cells of each row of the table of what was measured: what, result, command, page."""
    rows = [line.strip("| ").split(" | ") for line in README.read_text().splitlines() if line.startswith("| ")]
    return rows[1:]  # without the head


def commands() -> list[str]:
    """Returns the commands that README names, without the comments behind them."""
    text = README.read_text()
    shown = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return [*shown, *re.findall(r"`((?:make|python|doodl-fast) [^`]+)`", text)]


def run(folder: Path, *command: str) -> str:
    """Returns what Python prints, run in a folder that is not the repository, so that an installed package is found."""
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_is_short_and_ends_with_a_picture() -> None:
    assert len(example()) <= 6
    assert example()[-1] == 'result.images[0].save("picture.png")'


def test_the_example_runs_word_for_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the line that loads the model is replaced, and there are fewer steps than by default, to save minutes."""
    (loading,) = (line for line in example() if line.startswith(LOADING))
    code = "\n".join(example()).replace(loading, "pipe = shapes.load_pipeline()")
    monkeypatch.chdir(tmp_path)
    few = functools.partial(doodl_fast.EDICT.from_pipeline, num_inference_steps=10)
    monkeypatch.setattr(doodl_fast.EDICT, "from_pipeline", few)
    monkeypatch.setattr(doodl_fast, "optimize", functools.partial(doodl_fast.optimize, num_optimization_steps=2))
    names: dict[str, object] = {"shapes": shapes}
    exec(compile(code, str(README), "exec"), names)
    result = names["result"]
    assert isinstance(result, doodl_fast.Result) and len(result.losses) == 2
    with Image.open("picture.png") as picture:
        assert picture.size == (64, 64) and picture.mode == "RGB"
        assert picture.tobytes() == result.images[0].pil()[0].tobytes()


def test_the_pages_that_readme_names_are_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text())
    assert "docs/pipelines.md" in links
    assert not [link for link in links if not (ROOT / link).is_file()]


def test_it_fits_on_one_screen() -> None:
    """A screen of 60 lines, with one figure."""
    lines = README.read_text().splitlines()
    assert len(lines) <= 60
    assert len(re.findall(r"!\[", "\n".join(lines))) == 1


def test_every_number_is_on_the_page_that_its_row_names() -> None:
    """To as many digits as README has of it."""
    rows = measured()
    assert len(rows) >= 4
    for _, result, _, page in rows:
        (path,) = re.findall(r"\((docs/[^)]+)\)", page)
        there = re.findall(NUMBER, (ROOT / path).read_text())
        for number, unit in re.findall(NUMBER, result):
            digits = len(number.partition(".")[2])
            assert any(round(float(n), digits) == float(number) and u == unit for n, u in there), (path, number)


def test_every_number_has_a_command_and_no_other_text_has_one() -> None:
    assert all(re.fullmatch("`[^`]+`", command) for _, _, command, _ in measured())
    prose = re.sub(r"```.*?```|^\|.*$|`[^`]*`|\]\([^)]*\)", "", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"arXiv [\d.]+|ICCV 2023|Python 3\.10|2\.11 or later|H200", "", prose)
    assert not re.findall(r"\d+", prose)


def test_the_targets_that_it_names_are_in_the_makefile() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {command.split()[1] for command in commands() if command.startswith("make ")}
    assert {"demo", "test", "docs", "paper"} <= named <= targets


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python ")])
def test_the_scripts_that_it_names_take_the_options_that_it_names(command: str, tmp_path: Path) -> None:
    script, *options = shlex.split(command)[1:]
    usage = run(tmp_path, str(ROOT / script), "--help")
    words = [option for option in options if option.startswith("--") or option.islower()]
    assert words and not [word for word in words if word not in usage]


def test_the_estimate_prints_the_numbers_of_its_row(tmp_path: Path) -> None:
    ((_, result, command, _),) = (row for row in measured() if "doodl-fast estimate" in row[2])
    printed = run(tmp_path, "-m", "doodl_fast.cli", *shlex.split(command.strip("`"))[1:])
    numbers = re.findall(r"[\d.]+ GiB", result)
    assert len(numbers) == 2
    for name, number in zip(("naive backpropagation", "our smallest plan"), numbers, strict=True):
        assert re.search(rf"^{name} +{re.escape(number)} with weights$", printed, re.MULTILINE)


def test_the_doctor_runs(tmp_path: Path) -> None:
    assert "doodl-fast doctor" in commands()
    assert "torch" in run(tmp_path, "-m", "doodl_fast.cli", "doctor")
