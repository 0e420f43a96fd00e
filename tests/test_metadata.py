"""The version, the deprecated names and the settings of the tools are the same in all files that contain them."""

from __future__ import annotations

import re
from pathlib import Path

import doodl_fast
from doodl_fast import _moved

ROOT = Path(__file__).resolve().parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text()


def test_every_file_has_the_same_version():
    patterns = {
        "pyproject.toml": r'^version = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
        "CHANGELOG.md": r"^## \[(.+)\]",
    }
    found = {name: re.search(pattern, text(name), re.MULTILINE)[1] for name, pattern in patterns.items()}
    assert set(found.values()) == {doodl_fast.__version__}, found


def test_the_changelog_names_every_module_that_moved():
    rows = re.findall(r"^\| `doodl_fast\.(\S+)` \| `doodl_fast\.(\S+)` \|$", text("CHANGELOG.md"), re.MULTILINE)
    assert dict(rows) == _moved.MOVED


def test_commit_hooks_run_the_checks_of_make_check():
    checks = text("Makefile").split("\ncheck: $(READY)\n")[1].split("\n\n")[0]
    commands = [line.split("$(BIN)/")[1] for line in checks.splitlines()]
    hooks = re.findall(r"entry: (.+)$", text(".pre-commit-config.yaml"), re.MULTILINE)
    assert [hook.removesuffix(" .") for hook in hooks] == [command.removesuffix(" .") for command in commands]


def workflows() -> str:
    """Returns the text of all workflows, one after the other."""
    return "\n".join(path.read_text() for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")))


def test_workflows_call_targets_and_scripts_that_are_there():
    targets = set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))
    called = re.findall(r"(?:run:|&&) make ([\w-]+)", workflows())
    assert {"check", "docs", "examples", "sanitize", "audit", "fuzz"} <= set(called) <= targets
    phony = set(re.search(r"^\.PHONY: (.+)$", text("Makefile"), re.MULTILINE)[1].split())
    assert set(called) <= phony
    for script in re.findall(r"\.ci/[\w.]+", text("Makefile") + text("noxfile.py") + text("mkdocs.yml")):
        assert (ROOT / script).is_file(), script


def test_the_matrix_is_the_same_everywhere():
    oldest = re.search(r'^requires-python = ">=(.+)"$', text("pyproject.toml"), re.MULTILINE)[1]
    sessions = re.findall(r'"(3\.\d+)"', re.search(r"^PYTHONS = (.+)$", text("noxfile.py"), re.MULTILINE)[1])
    matrix = re.findall(r'"(3\.\d+)"', re.search(r"^ +python: \[(.+)\]$", workflows(), re.MULTILINE)[1])
    assert sessions == matrix and sessions[0] == oldest
    torch = re.search(r'"torch>=([\d.]+)"', text("pyproject.toml"))[1]
    assert f'OLDEST_TORCH, NEWEST_TORCH = "{torch}", ""' in text("noxfile.py")
    assert set(re.findall(r'"torch==([\d.]+)\.\*"', workflows())) == {torch}
    numbers = [int(number) for number in torch.split(".")]
    assert f"OLDEST_TORCH = ({numbers[0]}, {numbers[1]})" in text("setup.py")
