"""The pages of the site: their code runs, their links lead somewhere, and the API reference has every public name."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import doodl_fast

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FOLDERS = (DOCS / "howto", DOCS / "from")
RUN = [
    DOCS / "index.md",
    DOCS / "start.md",
    DOCS / "embedded.md",
    *(page for folder in FOLDERS for page in sorted(folder.glob("*.md"))),
]
FEW = {"num_optimization_steps": 1, "num_inference_steps": 4}


def hook(name: str = "site_pages") -> ModuleType:
    """Imports the hook of MkDocs, or another script of the folder that it is in, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path) -> list[str]:
    """Returns the code of a page that is marked as Python; what needs a download is marked as `py`."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def shortened(code: str) -> str:
    """Returns code with few steps, so that it takes less than a second or two."""
    for name, number in FEW.items():
        code = re.sub(rf'({name}"?[=:] ?)\d\d+', rf"\g<1>{number}", code)
    return re.sub(r"in range\(\d\d+\)", "in range(1)", code)


@pytest.mark.parametrize("page", [page for page in RUN if blocks(page)], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page are one program, from top to bottom."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks(page):
        exec(compile(shortened(code), str(page), "exec"), names)
    result = names.get("result")
    if isinstance(result, doodl_fast.Result):
        assert all(torch.isfinite(torch.tensor(result.losses))) and result.losses


def test_the_solver_of_the_page_is_ddim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {}
    for code in blocks(DOCS / "howto" / "own-solver.md"):
        exec(compile(shortened(code), "own-solver.md", "exec"), names)
    ours, ddim, noise = names["ours"], names["ddim"], names["noise"]
    assert (ours(noise)[0] - ddim(noise)[0]).abs().max() < 1e-5  # type: ignore[operator]
    longer = names["Stretched"].from_pipeline(names["pipe"], "a red circle", num_inference_steps=4, stretch=1.1)  # type: ignore[attr-defined]
    assert (longer(noise)[0] - ddim(noise)[0]).abs().max() > 1e-2  # type: ignore[operator]


def test_the_regulariser_of_reno_is_least_at_the_usual_length() -> None:
    """The length of normal noise has a chi distribution, whose mode is the root of its dimension less one."""
    code = blocks(DOCS / "from" / "reno.md")[0]
    names: dict[str, object] = {"torch": torch}
    exec(code[code.index("def regulariser") : code.index("\n\n\nnoise = ")], names)
    lengths = torch.linspace(1, 12, 1101, dtype=torch.float64)
    values = [names["regulariser"](length * torch.eye(1, 50, dtype=torch.float64)) for length in lengths]  # type: ignore[operator]
    assert abs(float(lengths[torch.stack(values).argmin()]) - 49**0.5) < 0.01


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and MkDocs make them of plain words."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).lower() for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    made = set(hook().reference_pages()) | set(hook().copied_pages())
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)\s]*)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        inside = file.relative_to(DOCS).as_posix() if file.is_relative_to(DOCS) else ""
        if inside in made:
            file = ROOT / hook().COPIED.get(inside, "README.md")
        assert file.is_file(), f"{target} leads to no file"
        assert not anchor or anchor in anchors(file), f"{target} leads to no heading"


def test_the_reference_has_every_public_name() -> None:
    pages = hook().reference_pages()
    listed = re.findall(r"^::: (\S+)$", "\n".join(pages.values()), re.MULTILINE)
    assert len(listed) == len(set(listed))
    packages = [m.name for m in pkgutil.iter_modules(doodl_fast.__path__) if m.ispkg and m.name != "cli"]
    assert {f"reference/{name}.md" for name in packages} <= set(pages)
    for module in [doodl_fast, *(importlib.import_module(f"doodl_fast.{name}") for name in packages)]:
        for name in getattr(module, "__all__", ()):
            if module is doodl_fast and name in packages:
                continue
            assert {f"{module.__name__}.{name}", f"doodl_fast.{name}"} & set(listed), (module, name)


def test_pages_that_the_navigation_does_not_name_are_added() -> None:
    config = {"nav": [{"Home": "index.md"}, {"How to": [{"Lora": "howto/lora.md"}]}], "docs_dir": str(DOCS)}
    more = hook().on_config(config)["nav"][-1]["More"]
    assert {"start.md", "changelog.md", "reference/index.md"} <= set(more)
    assert not {"index.md", "howto/lora.md"} & set(more)


def test_links_that_leave_the_pages_are_rewritten() -> None:
    rewrite = hook().rewrite_links
    assert rewrite("[a](../CONTRIBUTING.md#x)", 0) == "[a](contributing.md#x)"
    assert rewrite("[a](../../CHANGELOG.md)", 1) == "[a](../changelog.md)"
    assert rewrite("[a](../bench/ops.py) [b](../memory.md)", 1) == "[a](../bench/ops.py) [b](../memory.md)"
    assert rewrite("see [ops](../bench/ops.py)", 0) == "see ops"


def site(folder: Path, body: str) -> list[str]:
    """Returns what the check of a site of two pages finds."""
    (folder / "other.html").write_text('<h1 id="top">other</h1>', encoding="utf-8")
    (folder / "index.html").write_text(body, encoding="utf-8")
    return hook("check_site").problems(folder)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="other.html#top">a</a> <a href="https://arxiv.org">b</a>', None),
        ('<a href="nowhere.html">a</a>', "index.html: nowhere.html leads to no file"),
        ('<a href="other.html#bottom">a</a>', "index.html: other.html#bottom leads to no heading"),
        ('<img src="nowhere.png">', "index.html: nowhere.png leads to no file"),
        ('<script src="https://cdn.example/x.js"></script>', "index.html: loads https://cdn.example/x.js"),
        (
            3 * "<blockquote>" + "f(x)" + 3 * "</blockquote>",
            "index.html: shows lines that begin with >>> as quotations",
        ),
        (3 * "<blockquote>a</blockquote>", None),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', "index.html: loads //fonts.example/x.css"),
    ],
)
def test_broken_links_and_remote_files_are_found(body: str, problem: str | None, tmp_path: Path) -> None:
    found = site(tmp_path, body)
    assert len(found) == (problem is not None) and all(line.startswith(str(problem)) for line in found)


def test_styles_that_load_remote_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "x.css").write_text("@import 'https://fonts.example/x.css';", encoding="utf-8")
    assert site(tmp_path, "") == ["x.css: loads something from another place"]
