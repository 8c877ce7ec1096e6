"""`bench.sources`: its prompts, the arithmetic of its table, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer

from bench import sources
from specdec import zoo


def test_copying_prompts_end_as_they_begin() -> None:
    tokenizer = zoo.load_pair()[2]
    prompts = sources.prompts_of("copying", tokenizer, 3)
    assert prompts.shape == (3, 184)
    assert torch.equal(prompts[:, 160:], prompts[:, :24])
    assert sources.prompts_of("new", tokenizer, 3).shape == (3, 64)


def test_ratios_by_hand() -> None:
    speeds = {"transformers": 5, "specdec_plain": 10, "specdec_ngram": 20, "specdec": 30, "specdec_both": 45}
    paths = [
        {"path": name, "label": name, "tokens_per_second": speed, "tokens_per_step": 2.0, "common": 0.5}
        | {"identical": name != "specdec"}
        for name, speed in speeds.items()
    ]
    assert sources.rows({"paths": paths}) == [
        ("specdec_plain", "10.0", "1.00×", "", "2.00", "identical"),
        ("specdec_ngram", "20.0", "2.00×", "", "2.00", "identical"),
        ("specdec", "30.0", "3.00×", "", "2.00", "first 50%"),
        ("specdec_both", "45.0", "4.50×", "1.50×", "2.00", "identical"),
    ]


def test_a_run_writes_its_tables(tmp_path: Path) -> None:
    sources.main("bundled", "1,2", 2, new_tokens=6, repeats=1, compile=False, out=tmp_path)
    result = json.loads((tmp_path / "sources.json").read_text())
    assert [(entry["kind"], entry["batch"]) for entry in result["results"]] == [
        ("new", 1), ("new", 2), ("copying", 1), ("copying", 2),
    ]  # fmt: skip
    assert all(row["identical"] for entry in result["results"] for row in entry["paths"])
    assert (tmp_path / "sources.md").read_text().count("specdec, model and n-grams") == 4


def test_batches_must_divide_the_prompts(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="divide --prompts 8"):
        sources.main("bundled", "3", 8, out=tmp_path)
