"""A hook of MkDocs that makes the pages of the site which are not files in docs/, see mkdocs.yml.

- The API reference: one page for each package, with every public name of it. The names are read from `__all__` in the
  sources, and mkdocstrings reads their docstrings there, so a site is built without torch.
- CHANGELOG.md, CONTRIBUTING.md and SECURITY.md of the repository, whose links are those of GitHub and are rewritten.
- Search works on pages that are read from the disk, without the script that the theme would load from elsewhere.
- A page in docs/ that the navigation in mkdocs.yml does not name yet is listed under "More".
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "doodl_fast"
COPIED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}
ORDER = ("solvers", "optimization", "guidance", "diffusion", "chain", "frozen", "ops", "integrations", "shapes")
LAST = ("compat",)
NOT_FOR_IMPORT = ("cli",)
REMOTE_SCRIPT = "https://unpkg.com/iframe-worker/shim"
LOCAL_SCRIPT = "javascripts/worker.js"


def constant(path: Path, name: str) -> Any:
    """Returns the value of a literal that a module assigns to a name, or None if it assigns none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ast.literal_eval(node.value)
    return None


def public_names() -> dict[str, list[str]]:
    """Returns the dotted public names by package: its own, and those of `doodl_fast` that live in it.

    A name that can be imported from `doodl_fast` is listed as that, and not once more as a name of its package.
    """
    init = PACKAGE / "__init__.py"
    homes: dict[str, str] = constant(init, "_HOMES")
    everything = [folder.parent.name for folder in sorted(PACKAGE.glob("*/__init__.py"))]
    packages = [*ORDER, *sorted(set(everything) - {*ORDER, *LAST, *NOT_FOR_IMPORT}), *LAST]
    found: dict[str, list[str]] = {}
    for package in packages:
        top = sorted(name for name in constant(init, "__all__") if homes.get(name, "").split(".")[0] == package)
        own = sorted(set(constant(PACKAGE / package / "__init__.py", "__all__") or ()) - set(top))
        if top or own:
            found[package] = [f"doodl_fast.{name}" for name in top] + [f"doodl_fast.{package}.{name}" for name in own]
    return found


def reference_pages() -> dict[str, str]:
    """Returns the Markdown of the API reference by the path of the page in the site."""
    names = public_names()
    lines = ["# API reference", "", (ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text())) or ""), ""]
    pages = {}
    for package, dotted in names.items():
        lines += [f"## [doodl_fast.{package}]({package}.md)", "", ", ".join(f"[`{n}`][{n}]" for n in dotted), ""]
        parts = [f"# doodl_fast.{package}", ""]
        doc = ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8")))
        parts += [doc or "", "", *(f"::: {name}\n" for name in dotted)]
        pages[f"reference/{package}.md"] = "\n".join(parts)
    return {"reference/index.md": "\n".join(lines), **pages}


def copied_pages() -> dict[str, str]:
    """Returns the Markdown of the repository's own files, with links that hold within the site."""
    return {page: (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](") for page, name in COPIED.items()}


def rewrite_links(markdown: str, depth: int) -> str:
    """Returns a page in which links to files outside of docs/ lead to their pages, or are plain text if there is none.

    Args:
        markdown: The text of the page.
        depth: How many folders below docs/ the page is.
    """
    up = "../" * (depth + 1)
    pages = {name: page for page, name in COPIED.items()} | {"README.md": "index.md"}

    def replaced(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        return f"[{text}]({'../' * depth}{pages[path]}{anchor})" if path in pages else text

    return re.sub(rf"\[([^\]\n]*)\]\({re.escape(up)}(?!\.\./)([^)#\s]+)(#[^)\s]*)?\)", replaced, markdown)


def named_pages(nav: Any) -> set[str]:
    """Returns the paths of the pages that a navigation names."""
    if isinstance(nav, str):
        return {nav}
    parts = nav.values() if isinstance(nav, dict) else nav
    return {path for part in parts for path in named_pages(part)}


def on_config(config: Any) -> Any:
    """Adds pages that the navigation does not name. MkDocs calls this first."""
    named = named_pages(config["nav"])
    docs = Path(config["docs_dir"])
    more = sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*.md"))
    more += sorted(set(reference_pages()) | set(copied_pages()))
    missing = [path for path in dict.fromkeys(more) if path not in named]
    if missing:
        config["nav"].append({"More": missing})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made here. MkDocs calls this once it has listed docs/."""
    from mkdocs.structure.files import File

    for path, text in {**reference_pages(), **copied_pages()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrites the links of a page. MkDocs calls this for each."""
    return rewrite_links(markdown, page.file.src_uri.count("/"))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Puts our own script in the place of one that the theme loads from elsewhere. MkDocs calls this for each page."""
    return output.replace(REMOTE_SCRIPT, "../" * page.file.src_uri.count("/") + LOCAL_SCRIPT)
