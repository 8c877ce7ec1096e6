"""The documentation holds together: its links lead somewhere, the site builds, and what it lists is all there is.

Its Python blocks are tests by themselves, see conftest.py in the repository's root.
"""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown.extensions.toc import slugify

import specdec
from specdec.fallbacks import FALLBACKS
from specdec.hf.names import TESTED

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Where links into a page may lead: its headings, and in the API the objects that it shows."""
    text = prose(page)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {slugify(heading, "-") for heading in headings} | {*re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}


def broken_links(page: Path) -> Iterator[str]:
    """The relative links of a page that lead to no file, or to no heading in it."""
    text = re.sub(r"`[^`\n]*`", "``", prose(page))
    for link in re.findall(r"\]\(([^()\s]+)\)", text):
        path, _, anchor = unquote(link).partition("#")
        if not re.match(r"\w+:", link):
            target = (page.parent / path) if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not [*broken_links(page)]


def test_broken_links_are_seen(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A `heading`, and more\n\n```\n# a comment\n```\n", encoding="utf-8")
    good = ["there.md", "there.md#a-heading-and-more", "https://nowhere.invalid/x.md", "#own"]
    bad = ["gone.md", "there.md#another", "there.md#a-comment", "#others"]
    text = "# Own\n\n" + "\n".join(f"[`x`]({link})" for link in good + bad) + "\n`[code](gone.md)`"
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    assert [*broken_links(tmp_path / "page.md")] == bad


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` builds."""
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(build, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return out


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_page_is_built(site: Path) -> None:
    built = {page.relative_to(site).with_suffix(".md").as_posix() for page in site.rglob("*.html")}
    assert {page.name for page in PAGES[1:]} <= built


def test_every_fallback_is_named(site: Path) -> None:
    text = text_of(site / "fallbacks.html")
    assert [fallback.reason for fallback in FALLBACKS if fallback.reason not in text] == []


def test_every_public_name_is_shown(site: Path) -> None:
    shown = set(re.findall(r'<h\d id="([\w.]+)"', (site / "api.html").read_text(encoding="utf-8")))
    assert {f"specdec.{name}" for name in specdec.__all__ if not name.startswith("__")} <= shown
    assert {"specdec.handle.Handle.warmup", "specdec.handle.Handle.tune", "specdec.config.Config"} <= shown


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    """No fonts, scripts, styles or pictures from another server."""
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(https?:[^\s\">]+)", page.read_text())
        assert not loaded, page


def test_versions_are_those_that_are_asked_for_and_tested() -> None:
    rows = dict(re.findall(r"^\| (\w+) \| (.+) \|$", (ROOT / "docs/versions.md").read_text(), re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name in ("torch", "transformers"):
        oldest = re.search(rf'"{name}>=([\d.]+)"', project)[1]
        assert rows[name] == f"{oldest} | {pins[name]}"
        assert name != "transformers" or (f"{oldest}.0", pins[name]) == TESTED
    assert rows["Python"].startswith(re.search(r'requires-python = ">=([\d.]+)"', project)[1])
