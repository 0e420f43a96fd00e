"""Checks the HTML of a site: links inside of it lead somewhere, examples are code, nothing is loaded from elsewhere.

python .ci/check_site.py site
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src")}
REMOTE_CSS = re.compile(r"(?:url\(|@import\s+)['\"]?(?:https?:)?//")
SAMPLES = ("404.html",)  # its links are absolute, because it is shown under any address


class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.depth = self.deepest = 0  # of quotations in one another
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.loads += [values[name] for kind, name in LOADED if kind == tag and name in values]
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(values.get("href", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "blockquote":
            self.depth += 1
            self.deepest = max(self.deepest, self.depth)

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == "blockquote"


def problems(site: Path) -> list[str]:
    """Returns what is wrong with the site in a folder, one line each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site}: expected HTML pages, found none; run mkdocs build"]
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        if name in SAMPLES:
            continue
        if page.deepest > 2:
            found.append(f"{name}: shows lines that begin with >>> as quotations, and not as code")
        found += [f"{name}: loads {url}" for url in page.loads if urlsplit(url).netloc]
        for url in [*page.links, *(url for url in page.loads if not urlsplit(url).netloc)]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue  # a link to another site, which is not followed: a build needs no network
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{name}: {url} leads to no file")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name}: {url} leads to no heading")
    for path in sorted(site.rglob("*.css")):
        if REMOTE_CSS.search(path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(site)}: loads something from another place")
    return found


def main() -> int:
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "site").resolve()
    found = problems(site)
    pages = len(list(site.rglob("*.html")))
    print("\n".join(found) or f"{pages} pages, no broken link, nothing is loaded from elsewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
