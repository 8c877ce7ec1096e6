"""Imports point one way, from what users call down to the kernels, and docs/architecture.md names every module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "specdec"
LAYERS = (
    {"__main__"},
    {"cli"},
    {"training"},
    {"__init__"},
    {"zoo"},
    {"api", "batching"},
    {"handle"},
    {"calls"},
    {"decoders"},
    {"tune", "drafters"},
    {"hf"},
    {"config"},
    {"engine"},
    {"verifiers", "graphs"},
    {"kernels"},
    {"progress"},
    {"arguments", "errors", "fallbacks"},
)
"""Folders and modules of specdec/. A module imports from its own folder and from the rows below."""
KNOWS_TRANSFORMERS = {"hf", "zoo", "training", "cli"}

FILES = {
    ".".join(("specdec", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for folder in (ROOT, ROOT / "kernels", ROOT / "graphs")  # the last two are links, which rglob does not follow
    for file in folder.rglob("*.py")
}


def place(module: str) -> str:
    """The folder, or the module, of specdec/ that a module is in."""
    return [*module.split("."), "__init__"][1]


def row(module: str) -> int:
    return next(i for i, places in enumerate(LAYERS) if place(module) in places)


def imported(source: str) -> Iterator[str]:
    """All that a source imports: also within functions, and for types alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not read here"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def edges() -> set[tuple[str, str]]:
    """Which module imports which; of other packages, transformers."""
    found = set()
    for module, file in FILES.items():
        for name in imported(file.read_text(encoding="utf-8")):
            if name.partition(".")[0] == "transformers":
                found.add((module, "transformers"))
            while name.startswith("specdec") and name not in FILES:  # a name in a module
                name = name.rpartition(".")[0]
            if name in FILES:
                found.add((module, name))
    return found


def reachable(start: str, pairs: set[tuple[str, str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        new = {other for one, other in pairs if one == module} - seen
        seen |= new
        waiting += new
    return seen


def wrong(pairs: set[tuple[str, str]]) -> set[str]:
    """Imports that point up or aside, into transformers from where nobody should know it, or that close a circle."""
    found = set()
    inner = {(one, other) for one, other in pairs if place(one) == place(other)}  # rows have no circles
    for one, other in pairs:
        if other == "transformers":
            is_wrong = place(one) not in KNOWS_TRANSFORMERS
        elif place(one) != place(other):
            is_wrong = row(other) <= row(one)
        else:
            is_wrong = one in reachable(other, inner)
        if is_wrong:
            found.add(f"{one} -> {other}")
    return found


def test_imports_point_one_way() -> None:
    assert not wrong(edges())


@pytest.mark.parametrize(
    "pair",
    [
        ("specdec.kernels.cpu", "specdec.engine.tree"),
        ("specdec.graphs.guards", "specdec.verifiers.base"),
        ("specdec.errors", "specdec"),
        ("specdec.engine.laws", "transformers"),
    ],
)
def test_a_wrong_import_is_seen(pair: tuple[str, str]) -> None:
    assert wrong({pair}) == {f"{pair[0]} -> {pair[1]}"}


def test_circles_are_seen() -> None:
    a, b, c, d = (f"specdec.engine.{name}" for name in "abcd")
    assert wrong({(a, b), (b, c), (c, a), (c, d)}) == {f"{a} -> {b}", f"{b} -> {c}", f"{c} -> {a}"}


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import a.b
if TYPE_CHECKING:
    from c import d
def f():
    from e.f import g as h
"""
    assert sorted(imported(source)) == ["a.b", "c.d", "e.f.g"]


def test_the_architecture_names_every_module() -> None:
    text = (ROOT.parent / "docs/architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE)
    assert len(named) == len(set(named))
    written = {file for file in FILES.values() if len(ast.parse(file.read_text(encoding="utf-8")).body) > 1}
    assert set(named) == {str(file.relative_to(ROOT)) for file in written}


def test_the_architecture_names_nothing_else() -> None:
    text = (ROOT.parent / "docs/architecture.md").read_text(encoding="utf-8")
    paths = {name for name in re.findall(r"`([\w/.]+/[\w.]*)`", text) if not (ROOT / name).exists()}
    assert {name for name in paths if not (ROOT.parent / name).exists()} == set()
