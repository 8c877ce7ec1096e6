"""Every reason to run transformers' own loop stands in `specdec.fallbacks`, with a remedy."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from specdec.fallbacks import FALLBACKS, remedy

ROOT = Path(__file__).resolve().parents[1] / "specdec"
OF_DRAFTS = {"decoders.py", "early_exit.py"}  # say why a draft is done without: no fallback


def template(node: ast.expr) -> str | None:
    """A reason in the source, its parts that differ as {}; None where it is handed on."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def reasons() -> Iterator[tuple[str, str]]:
    """Each reason that the sources give, and where."""
    for file in ROOT.rglob("*.py"):
        if file.name in OF_DRAFTS:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_reason = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Unsupported"
            if is_reason and (found := template(node.args[0])) is not None:
                yield found, f"{file.name}:{node.lineno}"


def test_the_table_is_what_the_sources_say() -> None:
    said = dict(reasons())
    listed = {re.sub(r"\{\w+\}", "{}", fallback.reason) for fallback in FALLBACKS}
    assert len(listed) == len(FALLBACKS)
    assert {r: place for r, place in said.items() if r not in listed} == {}
    assert listed - set(said) == set()


@pytest.mark.parametrize("fallback", FALLBACKS, ids=lambda fallback: fallback.reason)
def test_every_reason_finds_its_own_remedy(fallback: object) -> None:
    reason = re.sub(r"\{(\w+)\}", r"some \1", fallback.reason)
    assert remedy(reason) == fallback.remedy
    assert fallback.remedy.endswith(".")


def test_reasons_of_others_have_none() -> None:
    assert remedy("something else") == ""
