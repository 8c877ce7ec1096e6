"""What mkdocs does beside building the pages of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from specdec.fallbacks import FALLBACKS

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "constraints.txt",
    "specdec/zoo/README.md",
    "specdec/zoo/curve.png",
    "specdec/zoo/target/*.md",
    "specdec/zoo/target/*.png",
    "examples/*.py",
    "bench/results/**/*.md",
    "bench/results/**/*.png",
)
"""Files that pages link to, and that are elsewhere in the repository: the same links work there and on the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that are not in this folder, each under its path in the repository."""
    for path in sorted(path.relative_to(ROOT).as_posix() for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        places = config.site_dir, config.use_directory_urls
        dest_uri = File(path, None, *places).dest_uri
        inclusion = InclusionLevel.NOT_IN_NAV if "/" in path else InclusionLevel.INCLUDED
        files.append(File(f"../{path}", config.docs_dir, *places, dest_uri=dest_uri, inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Write the table of fallbacks where its page has the marker, and keep tables of figures out of the search."""
    if "/results/" in page.file.src_uri:
        page.meta["search"] = {"exclude": True}
    return markdown.replace("<!-- fallbacks -->", fallback_table())


def fallback_table() -> str:
    """Every reason to run transformers' own loop, in Markdown."""
    lines: list[str] = []
    for about in dict.fromkeys(fallback.about for fallback in FALLBACKS):
        lines += ["", f"### About {about}", "", "| reason | what to do |", "|---|---|"]
        lines += [f"| `{each.reason}` | {each.remedy} |" for each in FALLBACKS if each.about == about]
    return "\n".join(lines)
