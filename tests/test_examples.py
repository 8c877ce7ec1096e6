"""The examples do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from specdec import zoo

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_a_drafter_of_ones_own_keeps_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_drafter.py"))["main"](compile=False)
    text, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n\n")
    target, _, tokenizer = zoo.load_pair()
    prompt = tokenizer("class Reader:\n    def __init__(", return_tensors="pt")
    plain = target.generate(**prompt, max_new_tokens=96, do_sample=False)
    assert text == tokenizer.decode(plain[0])
    steps, _, unit = last.partition(" ")
    assert unit == "tokens per step"
    assert float(steps) > 1.2
