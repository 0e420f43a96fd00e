"""README's example runs as it is printed, on the embedded pipeline."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
from PIL import Image

import doodl_fast
from doodl_fast import shapes

README = Path(__file__).parents[1] / "README.md"
LOADING = "pipe = diffusers."


def example() -> list[str]:
    """Returns the code of the first Python block after the line that begins with "On your own"."""
    block = README.read_text().split("\nOn your own", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    return [line for line in block.splitlines() if line]


def test_the_example_is_short_and_ends_with_a_picture() -> None:
    assert len(example()) <= 6
    assert example()[-1] == 'result.images[0].save("dog.png")'


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
    with Image.open("dog.png") as picture:
        assert picture.size == (64, 64) and picture.mode == "RGB"
        assert picture.tobytes() == result.images[0].pil()[0].tobytes()


def test_the_pages_that_readme_names_are_there() -> None:
    links = re.findall(r"\]\(((?:docs/)[^)#]+)", README.read_text())
    assert "docs/pipelines.md" in links
    assert not [link for link in links if not (README.parent / link).is_file()]
