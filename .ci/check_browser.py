"""Looks at pages in a headless Chromium, as a reader would: the site in a folder, galleries of sweeps in HTML files.

    CHROMIUM=/usr/bin/chromium python .ci/check_browser.py site gallery.html --screenshots shots

Pages are read from the disk, without a server, 1280 and 390 pixels wide, light and dark. What is wrong is printed, one
line each: errors in the console, requests to the network, pages that scroll sideways, text that is hard to read, a
search, a menu, a switch to dark mode or columns that do not work. It needs the package playwright, which drives the
browser, and a Chromium or Chrome; without one it says so and ends well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, NARROW, HEIGHT = 1280, 390, 844
VIEWS = ((WIDE, "light"), (WIDE, "dark"), (NARROW, "light"), (NARROW, "dark"))
QUERY = "memory budget"
SCHEMES = {"light": "default", "dark": "slate"}
TEXT = ".md-typeset :is(p, li, td, th, h1, h2, a:not(.headerlink), pre code span)"
LEAST_CONTRAST = 4.5
"""The least contrast of text of WCAG 2, level AA."""
CONTRAST = """selector => {
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = rgb => { const [r, g, b] = rgb.map(v => linear(v / 255)); return .2126 * r + .7152 * g + .0722 * b; };
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (...colours) => {  // painted over one another, so that transparency and every notation are right
    for (const colour of ["#fff", ...colours]) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  let least = 21, text = "";
  for (const element of document.querySelectorAll(selector)) {
    if (!element.textContent.trim() || !element.getClientRects().length) continue;
    const behind = [];
    for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
    const [a, b] = [light(rgb(...behind)), light(rgb(...behind, getComputedStyle(element).color))];
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < least) [least, text] = [contrast, element.textContent.trim().slice(0, 40)]; }
  return [least, text]; }"""

ROWS = """async () => {
  const rows = [];
  for (const [n, row] of data.rows.slice(0, PAGE).entries()) {
    const line = document.querySelectorAll("#body tr")[n], curves = line.querySelectorAll("svg polyline").length;
    const captions = [...line.querySelectorAll("figcaption")].map(caption => caption.textContent);
    const images = [...line.querySelectorAll("img")];
    for (const image of images) { image.loading = "eager"; await image.decode(); }  // an error without a picture
    const missing = row.status === "done" && (captions.slice(0, 2).join() !== "before,after" ||
                                              images.length !== captions.length);
    rows.push({ captions, curves, missing, curved: curves === Number(row.losses.length > 1) }); }
  return rows; }"""


def browser_path() -> str | None:
    """Returns the path of a Chromium: that in CHROMIUM, or the first one in PATH. None if there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def opened(browser: Any, width: int, scheme: str, found: list[str], where: str) -> Iterator[Any]:
    """A new page, which adds errors and requests to the network to what was found."""
    narrow = width == NARROW
    context = browser.new_context(
        viewport={"width": width, "height": HEIGHT}, color_scheme=scheme, is_mobile=narrow, has_touch=narrow
    )
    page = context.new_page()
    name = f"{where}, {width} pixels, {scheme}"
    page.set_default_timeout(10_000)
    page.on("console", lambda m: m.type in ("error", "warning") and found.append(f"{name}: console: {m.text}"))
    page.on("pageerror", lambda error: found.append(f"{name}: error: {error}"))
    # What is still loading when another page is opened is aborted, which is no fault.
    page.on(
        "requestfailed",
        lambda r: r.failure != "net::ERR_ABORTED" and found.append(f"{name}: could not load {r.url[:200]}"),
    )
    page.on("request", lambda r: r.url.startswith(("http", "ws")) and found.append(f"{name}: asks for {r.url[:200]}"))
    try:
        yield page
    except Exception as error:  # a control that is not there, or does not answer in time
        found.append(f"{name}: {str(error).splitlines()[0]}")
    finally:
        context.close()


def looks(page: Any, width: int, name: str, text: str) -> list[str]:
    """Returns what is wrong with the width of a page, and with the contrast of the elements that `text` selects."""
    wide = page.evaluate("document.documentElement.scrollWidth")
    contrast, words = page.evaluate(CONTRAST, text)
    found = [f"{name}: is {wide} pixels wide where the screen has {width}"] if wide > width else []
    return found + ([f"{name}: {words!r} has a contrast of {contrast:.2f}"] if contrast < LEAST_CONTRAST else [])


def check_site(browser: Any, site: Path, shots: Path | None) -> list[str]:
    """Returns what is wrong with the site in a folder."""
    found: list[str] = []
    files = [path for path in sorted(site.rglob("*.html")) if path.name != "404.html"]
    for width, scheme in VIEWS:
        with opened(browser, width, scheme, found, "site") as page:
            for path in files:
                page.goto(path.as_uri())
                name = f"{path.relative_to(site)}, {width} pixels, {scheme}"
                got = page.get_attribute("body", "data-md-color-scheme")
                found += [] if got == SCHEMES[scheme] else [f"{name}: has the colours {got!r}"]
                found += looks(page, width, name, TEXT)
                if shots:
                    flat = path.relative_to(site).with_suffix("").as_posix().replace("/", "-")
                    page.screenshot(path=shots / f"{flat}-{width}-{scheme}.png")
        with opened(browser, width, scheme, found, "index.html") as page:
            page.goto((site / "index.html").as_uri())
            found += controls(page, width, scheme, shots)
    return found


def controls(page: Any, width: int, scheme: str, shots: Path | None) -> list[str]:
    """Uses the menu, the switch between light and dark, and the search of the site's first page."""
    found, narrow, start = [], width == NARROW, page.url
    if narrow:
        page.click("label.md-header__button[for=__drawer]")
        page.wait_for_timeout(500)  # it slides in
        if shots:
            page.screenshot(path=shots / f"menu-{scheme}.png")
    page.click(".md-nav--primary .md-nav__link:has-text('Concepts')")
    page.wait_for_url("**/concepts.html")
    page.goto(start)
    page.click(".md-header__option label:visible")
    other = page.get_attribute("body", "data-md-color-scheme")
    if other == SCHEMES[scheme]:
        found.append(f"index.html, {width} pixels: the switch leaves the colours at {other!r}")
    if narrow:
        page.click("label.md-header__button[for=__search]")
        page.wait_for_timeout(500)
    page.click(".md-search__input")
    page.keyboard.type(QUERY, delay=20)
    page.wait_for_selector(".md-search-result__link")
    titles = page.eval_on_selector_all(".md-search-result__item h1", "all => all.map(one => one.textContent)")
    if "Memory" not in titles:
        found.append(f"index.html, {width} pixels: a search for {QUERY!r} finds {titles}")
    if shots:
        page.screenshot(path=shots / f"search-{width}-{scheme}.png")
    page.click(".md-search-result__link >> nth=0")
    page.wait_for_url("**h=memory*")
    return found


def check_gallery(browser: Any, path: Path, shots: Path | None) -> list[str]:
    """Returns what is wrong with the gallery of a sweep."""
    found: list[str] = []
    for width, scheme in VIEWS:
        name = f"{path.name}, {width} pixels, {scheme}"
        with opened(browser, width, scheme, found, path.name) as page:
            page.goto(path.as_uri())
            found += looks(page, width, name, "td:not(.empty), th button, figcaption, label, #count")
            found += pictures(page, name)
            found += sorting(page, width, name) + searching(page, name)
            if shots:
                page.screenshot(path=shots / f"{path.stem}-{width}-{scheme}.png")
    return found


def pictures(page: Any, name: str) -> list[str]:
    """Every run that is done has a picture before and after; runs of several steps have a curve."""
    rows = page.evaluate(ROWS)
    found = [f"{name}: row {n} has the pictures {row['captions']}" for n, row in enumerate(rows) if row["missing"]]
    found += [f"{name}: row {n} has {row['curves']} curves" for n, row in enumerate(rows) if not row["curved"]]
    return found if rows else [f"{name}: has no rows"]


def sorting(page: Any, width: int, name: str) -> list[str]:
    """Sorts by every column, up and down: by its heading, or by the list of columns on a narrow screen."""
    found = []
    read = """name => found.map(row => valueOf(row, name)).filter(v => v !== null && v !== undefined)"""
    shown = """() => [...document.querySelectorAll("#body tr")].map(row => row.title)"""
    for column in page.evaluate("[...texts, ...data.columns]"):
        orders = []
        for down in (False, True):
            if width == NARROW and down:
                page.click("label.narrow button")
            elif width == NARROW:
                page.select_option("label.narrow select", column)
            else:
                page.click(f"th[data-name='{column}'] button")
            values = page.evaluate(read, column)
            orders.append(values)
            same = page.evaluate(shown) == page.evaluate("found.slice(0, PAGE).map(row => row.run)")
            numbers = not any(isinstance(value, str) for value in values)  # texts are in the reader's own order
            if not same or (numbers and values != sorted(values, reverse=down)):
                found.append(f"{name}: sorting by {column!r}, {'down' if down else 'up'}, gives {values[:5]}")
        if orders[0] != orders[1][::-1]:
            found.append(f"{name}: sorting by {column!r} down is not the reverse of up")
        if width == NARROW:
            page.click("label.narrow button")  # up again
    return found


def searching(page: Any, name: str) -> list[str]:
    """Searches for the first run's name, and for nothing that is there."""
    run, total = page.evaluate("[data.rows[0].run, data.rows.length]")
    counts = []
    for text in (run, "nothing has this name", ""):
        page.fill("#search", text)
        counts.append(page.evaluate("found.length"))
    return [] if counts == [1, 0, total] else [f"{name}: the search finds {counts} runs, expected {[1, 0, total]}"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="folders of sites, and HTML files of galleries")
    parser.add_argument("--screenshots", type=Path, help="a folder for pictures of all pages, to be looked at")
    options = parser.parse_args(arguments)
    executable = browser_path()
    if executable is None:
        print("not checked: there is no Chromium here; install one (Debian: apt-get install chromium) or set CHROMIUM")
        return 0
    from playwright.sync_api import Error, sync_playwright

    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    found = []
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=executable)
        except Error as error:
            raise SystemExit(f"CHROMIUM: expected a Chromium that starts, got {executable}:\n{error}") from None
        version = browser.version
        for path in (path.resolve() for path in options.paths):
            found += (check_site if path.is_dir() else check_gallery)(browser, path, options.screenshots)
        browser.close()
    print("\n".join(found) or f"Chromium {version}: nothing is wrong with {', '.join(map(str, options.paths))}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
