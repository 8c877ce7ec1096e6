"""The benchmark of many prompts runs, tiny, and its ways decode the same prompts to the same texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from side_by_side import Prompts, Tiny, wrap
from transformers import PreTrainedModel

from bench import many

pytestmark = pytest.mark.filterwarnings("ignore")


def test_ways_return_whole_texts_in_order(model: PreTrainedModel, tiny: Tiny, prompts: Prompts) -> None:
    inputs = prompts([7, 2, 11, 4, 1])
    texts = [ids[mask.bool()] for ids, mask in zip(*inputs.values(), strict=True)]
    expected = [model.generate(ids[None], max_new_tokens=6)[0].tolist() for ids in texts]
    wrapped = wrap(model, tiny("llama", seed=7, num_hidden_layers=1))
    for each in (model, wrapped):
        assert many.one_by_one(each, texts, 6) == expected
        assert many.in_batches(each, 2, texts, 6) == expected
    assert many.many(wrapped, 2, texts, 6) == expected


def test_everything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    many.main("bundled", 4, 2, 5, 1, "bundled", compile=False, out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"many.json", "many.md"}
    result = json.loads((tmp_path / "many.json").read_text())
    (entry,), (memory,) = result["results"], result["memory"]
    assert [row["way"] for row in entry["ways"]][:2] == ["loop", "batches"]
    assert len(entry["ways"]) == 7
    for row in entry["ways"]:
        assert row["identical"] == 4
        assert row["tokens_per_second"] == 4 * 5 / row["seconds"][0]
        assert (row["tokens_per_step"] is None) == (row["way"] in ("loop", "batches"))
    assert memory["rows"] == 2
    assert memory["longest"] == 512 + 64
    assert memory["taken"] > memory["caches"] > 0
    text = (tmp_path / "many.md").read_text()
    assert f"| {memory['taken'] / memory['predicted']:.2f} |" in text
    assert text.count("| identical |") == 7
