"""What a configuration stands for, and what of it is refused."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest

from doodl_fast.sweep import Plan, expand, read_config
from doodl_fast.sweep.config import assign

TOML = """
seeds = [3, 5]
guides = ["clip-text+symmetry:0.1", "symmetry"]
methods = ["none", "best-of-16", "one-step", "ddim"]
measures = ["shapes"]

[prompts]
template = "a {colour} {shape}"
colour = ["red", "blue"]
shape = ["circle", "star"]

[options]
model = "shapes"
grad-scale = 10.0

[settings.short]
optimization_steps = 5
"""


def test_every_combination_once(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    plan = expand(read_config(tmp_path / "a.toml"))
    assert len(plan.runs) == 4 * 2 * 1 * 4 * 2 == len({run.name for run in plan.runs})
    assert list(dict.fromkeys(run.prompt for run in plan.runs)) == [
        "a red circle",
        "a red star",
        "a blue circle",
        "a blue star",
    ]
    first = plan.runs[0]
    assert (first.seed, first.guide, first.method, first.setting) == (3, "clip-text+symmetry:0.1", "none", "short")
    common = {"model": "shapes", "grad_scale": 10.0, "optimization_steps": 5}
    assert first.options == {**common, "guidance": ["clip-text", "symmetry:0.1"], "kind": "none"}
    own = {run.method: run.options for run in plan.runs if run.guide == "symmetry"}
    assert own["best-of-16"] == {**common, "guidance": ["symmetry"], "kind": "best-of", "best_of": 16}
    assert own["ddim"] == {**common, "guidance": ["symmetry"], "solver": "ddim"}
    assert plan.measures == ("shapes",)


def test_all_formats_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    config = read_config(tmp_path / "a.toml")
    (tmp_path / "a.json").write_text(json.dumps(config))
    assert read_config(tmp_path / "a.json") == config
    yaml = pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    assert read_config(tmp_path / "a.yaml") == config


def test_prompts_of_a_file_and_with_options_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# hard ones\na red circle\n\n  a blue star  \n")
    plan = expand({"prompts": {"file": "prompts.txt"}, "seeds": 3, "options": {"guidance": "symmetry"}}, tmp_path)
    assert [(run.prompt, run.seed) for run in plan.runs[:4]] == [
        ("a red circle", 0),
        ("a red circle", 1),
        ("a red circle", 2),
        ("a blue star", 0),
    ]
    assert plan.runs[0].guide == "symmetry" and plan.runs[0].method == "optimize"
    own = [{"prompt": "a red star", "label": "6-pointed star"}, "a circle"]
    assert [run.options for run in expand({"prompts": own}).runs] == [{"label": "6-pointed star"}, {}]


def test_a_name_depends_on_what_is_computed_alone() -> None:
    def name(**options: Any) -> str:
        return expand({"prompts": ["a dog"], "options": {"steps": 4, **options}}).runs[0].name

    assert name() == name(memory="naive") != name(steps=5)
    assert "a-dog_s0_" in name()
    more = {run.name for run in expand({"prompts": ["a cat", "a dog"], "seeds": 3, "options": {"steps": 4}}).runs}
    assert name() in more


def test_values_of_the_command_line() -> None:
    config = {"options": {"steps": 3}}
    changed = assign(config, ["options.steps=12", "seeds=[0, 1]", "options.model=shapes", "settings.a.lr=0.5"])
    assert changed == {
        "options": {"steps": 12, "model": "shapes"},
        "seeds": [0, 1],
        "settings": {"a": {"lr": 0.5}},
    }
    assert config == {"options": {"steps": 3}}
    for text in ("steps", "=3", "options.=3"):
        with pytest.raises(ValueError, match="--set: expected KEY=VALUE"):
            assign(config, [text])
    with pytest.raises(ValueError, match="--set: expected a table at 'steps'"):
        assign(config, ["options.steps.more=1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts: expected a list of texts, a table with file"),
        ({"prompts": None}, "prompts: expected a list of texts"),
        ({"prompts": [" "]}, "prompts: expected texts, or tables with a text prompt, got ' '"),
        ({"prompts": [{"label": "x"}]}, "prompts: expected texts, or tables with a text prompt"),
        ({"prompts": {"template": "a {colour}"}}, r"prompts: expected lists of words for \['colour'\]"),
        ({"prompts": {"template": "a {colour"}}, "the template 'a {colour' cannot be read"),
        ({"prompts": {"template": 3}}, "prompts: expected a text template"),
        ({"prompts": {"template": "a {c}", "c": [1]}}, "prompts.c: expected a list of texts"),
        ({"prompts": {"file": "a", "template": "b"}}, "prompts: expected file alone"),
        ({"prompts": ["a", "a"]}, "sweep: expected different runs, got one twice: .* prompt 'a', seed 0"),
        ({"seeds": []}, "seeds: expected a list of whole numbers"),
        ({"seeds": [-1]}, "seeds: expected a list of whole numbers"),
        ({"seeds": True}, "seeds: expected a list of whole numbers"),
        ({"seeds": [1.5]}, "seeds: expected a list of whole numbers"),
        ({"guides": {"a": 3}}, "guides.a: expected a table of options, got 3"),
        ({"guides": []}, "guides: expected a list of names, or a table of tables"),
        ({"methods": ["ddim", "ddim"]}, "methods: expected each once"),
        ({"settings": ["short"]}, "settings: expected a table of tables with options"),
        ({"measures": "shapes"}, "measures: expected a list of texts"),
        ({"steps": 3}, "CONFIG: expected prompts, seeds, .*, got 'steps'; options of `doodl-fast run` belong under"),
        ({"guides": {"a": {"steps": 1}}, "methods": {"b": {"steps": 2}}}, "expected 'steps' in one place, got it in"),
        ({"seeds": 10**6, "prompts": ["a", "b"]}, "expected at most 1000000 runs, got 2000000"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand({"prompts": ["a dog"], **change})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", r"CONFIG: expected a file that ends in .toml"),
        ("a.toml", "a = ", r"CONFIG: '.*a.toml' cannot be read"),
        ("a.json", "{", "cannot be read"),
        ("a.json", "[1]", "CONFIG: expected a table of prompts, .*, got a list"),
        ("a.json", "[" * 100_000, "cannot be read"),
        ("a.yaml", "a: [", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, text: str, message: str) -> None:
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / name)


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name in ("tomllib", "tomli", "yaml"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for name, message in (("a.toml", "pip install tomli"), ("a.yml", "pip install pyyaml")):
        (tmp_path / name).write_text("")
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path / name)


def test_the_plan_of_a_folder(tmp_path: Path) -> None:
    plan = expand({"prompts": ["a"], "seeds": 2, "measures": ["shapes"], "options": {"steps": 3}})
    plan.store(tmp_path / "new" / "out")
    plan.store(tmp_path / "new" / "out")
    assert Plan.load(tmp_path / "new" / "out") == plan
    other = expand({"prompts": ["a"], "seeds": 3, "measures": ["shapes"], "options": {"steps": 3}})
    with pytest.raises(
        ValueError, match=r"another configuration \(1 runs are new and 0 are gone\); pass --change-plan"
    ):
        other.store(tmp_path / "new" / "out")
    other.store(tmp_path / "new" / "out", replace=True)
    assert Plan.load(tmp_path / "new" / "out") == other
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["sweep.json"]


def test_folders_that_cannot_be_one(tmp_path: Path) -> None:
    plan = expand({"prompts": ["a"]})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="--out: expected a folder, got the file"):
        plan.store(tmp_path / "file")
    with pytest.raises(ValueError, match="which holds other files"):
        plan.store(tmp_path)
    with pytest.raises(ValueError, match=r"expected the folder of a sweep, with sweep.json in it"):
        Plan.load(tmp_path)
    good = json.dumps(plan.as_dict())
    for text in ("[]", "{", good.replace('"format": 1', '"format": 9'), good.replace('"seed": 0', '"seed": 1')):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(ValueError, match="is damaged or foreign"):
            Plan.load(tmp_path)


def test_the_example_of_the_docs() -> None:
    """It has as many runs as the page says, and its options can be read."""
    from doodl_fast.cli.sweep_options import different, namespace
    from doodl_fast.sweep.config import _toml

    page = (Path(__file__).parents[2] / "docs" / "howto" / "sweep.md").read_text()
    whole, part = re.findall(r"^```toml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    plan = expand(_toml(whole))
    assert f"so {len(plan.runs)} runs" in page
    more = _toml(whole) | {"methods": _toml(part)["methods"]}
    for run in different([*plan.runs, *expand(more).runs]):
        args = namespace(run)
        assert args.model == "shapes" and args.steps == (4 if run.method == "all-noise" else 12)
