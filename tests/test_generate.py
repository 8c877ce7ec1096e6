"""`generate()` of a wrapped model: arguments, drafts, seeds and statistics, against transformers' own."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from transformers import GenerationConfig, PreTrainedModel

import specdec

# Arguments that transformers knows.


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_lengths(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    for arguments in ({"max_length": 30}, {"max_new_tokens": 30}, {"max_length": 10, "max_new_tokens": 7}, {}):
        same(wrapped, model, **prompts(RAGGED), **arguments)


def test_generation_config_objects(
    wrapped: PreTrainedModel, fresh: Tiny, model: PreTrainedModel, prompts: Prompts
) -> None:
    inputs = prompts(RAGGED)
    out = same(wrapped, model, **inputs, generation_config=GenerationConfig(max_new_tokens=11, pad_token_id=0))
    assert out.shape[1] == 20
    own = fresh("llama")
    own.generation_config.max_new_tokens = 5
    again = wrap(own)
    assert torch.equal(again.generate(**inputs), out[:, :14])
    again.generation_config.max_new_tokens = 6
    assert torch.equal(again.generate(**inputs), out[:, :15])


def test_lists_of_ends(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    inputs = prompts(RAGGED)
    free = model.generate(**inputs, max_new_tokens=20)[:, 9:].tolist()
    for eos in (free[0][4], [free[0][4]], [free[1][8], free[3][2]]):
        out = same(wrapped, model, **inputs, max_new_tokens=20, eos_token_id=eos, pad_token_id=0)
        assert (out[:, -1] == 0).any() or out.shape[1] < 29


def test_a_mask_is_not_needed(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    ids = prompts([8, 8])["input_ids"]
    same(wrapped, model, inputs=ids, max_new_tokens=9)
    same(wrapped, model, inputs=prompts(RAGGED)["input_ids"], max_new_tokens=9)  # transformers finds the padding itself
    same(wrapped, model, max_new_tokens=9)  # from the beginning-of-text token alone


def test_inference_mode(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    inputs = prompts(RAGGED)
    expected = model.generate(**inputs, max_new_tokens=9)
    with torch.inference_mode():
        assert torch.equal(wrapped.generate(**prompts(RAGGED), max_new_tokens=9), expected)
        sampled = wrapped.generate(**inputs, max_new_tokens=9, do_sample=True, top_p=0.9)
    assert sampled.shape == expected.shape
    assert torch.equal(wrapped.generate(**inputs, max_new_tokens=9), expected)


@pytest.mark.parametrize("do_sample", [False, True])
def test_no_gradients_are_kept(wrapped: PreTrainedModel, prompts: Prompts, do_sample: bool) -> None:
    out = wrapped.generate(**prompts(RAGGED), max_new_tokens=5, do_sample=do_sample)
    assert not out.requires_grad
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in wrapped.parameters())


def test_several_return_sequences(wrapped: PreTrainedModel, prompts: Prompts) -> None:
    out = wrapped.generate(**prompts([4, 2]), max_new_tokens=6, do_sample=True, num_return_sequences=3)
    assert out.shape == (6, 10)
    assert torch.equal(out[:, :4], prompts([4, 2])["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row) for row in out.tolist()}) == 6
    assert len(wrapped.specdec.seeds) == 6


def test_max_time_stops_early_with_a_true_beginning(tiny: Tiny, model: PreTrainedModel, prompts: Prompts) -> None:
    class Slow:
        def __init__(self) -> None:
            self.inner = specdec.drafters.ngram.NgramDrafter(1)
            self.tree = self.inner.tree

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def draft(self, *arguments: Any) -> Any:
            time.sleep(0.05)
            return self.inner.draft(*arguments)

    inputs = prompts(RAGGED)
    full = model.generate(**inputs, max_new_tokens=100)
    start = time.perf_counter()
    out = wrap(model, Slow()).generate(**inputs, max_new_tokens=100, max_time=0.3)
    assert time.perf_counter() - start < 3
    assert 10 <= out.shape[1] < 60
    assert torch.equal(out, full[:, : out.shape[1]])


# Drafts named by the call.


def test_assistant_models(model: PreTrainedModel, tiny: Tiny, prompts: Prompts) -> None:
    wrapped = wrap(model, None)
    expected = model.generate(**prompts([9]), max_new_tokens=12)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="specdec")
        out = wrapped.generate(**prompts([9]), max_new_tokens=12, assistant_model=model)
        assert torch.equal(out, expected)
        assert wrapped.specdec.stats.acceptance_by_position == [1.0] * 5
        expected = model.generate(**prompts(RAGGED), max_new_tokens=12)
        for assistant in (model, tiny("llama", seed=7, num_hidden_layers=1)):  # transformers takes no batch here
            out = wrapped.generate(**prompts(RAGGED), max_new_tokens=12, assistant_model=assistant)
            assert torch.equal(out, expected)


def test_prompt_lookup(model: PreTrainedModel, prompts: Prompts) -> None:
    wrapped = wrap(model, None)
    again = {"input_ids": prompts([9])["input_ids"].repeat(1, 3)}
    expected = model.generate(**again, max_new_tokens=20)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="specdec")
        out = wrapped.generate(**again, max_new_tokens=20, prompt_lookup_num_tokens=4, max_matching_ngram_size=2)
    assert torch.equal(out, expected)
    assert len(wrapped.specdec.stats.proposed) == 4
    assert wrapped.specdec.stats.proposed[0] > 0


# Seeds.


@pytest.mark.parametrize("draft", ["ngram", "other"])
def test_seeds_fix_the_text_whatever_the_batch(
    draft: str, model: PreTrainedModel, tiny: Tiny, prompts: Prompts
) -> None:
    wrapped = wrap(model, "ngram" if draft == "ngram" else tiny("llama", seed=7, num_hidden_layers=1))
    lengths, seeds, width, n_new = [12, 2, 1, 6], [11, 22, 33, 2**61 + 5], 12, 14
    inputs = prompts(lengths, vocab=6)
    arguments = {"do_sample": True, "temperature": 1.5, "top_k": 40, "max_new_tokens": n_new}

    def sample(rows: list[int]) -> list[list[int]]:
        wrapped.specdec.seeds = [seeds[r] for r in rows]
        out = wrapped.generate(**{name: x[rows] for name, x in inputs.items()}, **arguments)
        assert wrapped.specdec.seeds.tolist() == [seeds[r] for r in rows]
        return out[:, width:].tolist()

    together = sample([0, 1, 2, 3])
    assert sample([0, 1, 2, 3]) == together
    assert sample([3, 1, 0, 2]) == [together[i] for i in (3, 1, 0, 2)]
    assert sample([2, 0]) == [together[2], together[0]]
    for row in range(4):
        assert sample([row]) == [together[row]]
    wrapped.specdec.seeds = [1, 2, 3, 4]
    assert wrapped.generate(**inputs, **arguments)[:, width:].tolist() != together


def test_seeds_are_drawn_from_torch_and_used_once(wrapped: PreTrainedModel, prompts: Prompts) -> None:
    arguments = {**prompts([5, 4]), "do_sample": True, "max_new_tokens": 12}
    torch.manual_seed(5)
    first, again = wrapped.generate(**arguments), wrapped.generate(**arguments)
    assert not torch.equal(first, again)
    torch.manual_seed(5)
    assert torch.equal(wrapped.generate(**arguments), first)
    wrapped.specdec.seeds = wrapped.specdec.seeds
    assert torch.equal(wrapped.generate(**arguments), first)
    assert not torch.equal(wrapped.generate(**arguments), first)


def test_as_many_seeds_as_samples(wrapped: PreTrainedModel, prompts: Prompts) -> None:
    wrapped.specdec.seeds = [1, 2, 3]
    with pytest.raises(ValueError, match="3 seeds were set for a batch of 2"):
        wrapped.generate(**prompts([5, 4]), do_sample=True, max_new_tokens=4)
    wrapped.generate(**prompts([5, 4]), do_sample=True, max_new_tokens=4)


# Statistics.


@pytest.mark.parametrize("do_sample", [False, True])
def test_stats_add_up(do_sample: bool, wrapped: PreTrainedModel, prompts: Prompts, tmp_path: Path) -> None:
    stats = wrapped.specdec.stats
    assert stats.tokens_per_step == 0
    wrapped.generate(**prompts(RAGGED), max_new_tokens=9, do_sample=do_sample)
    wrapped.generate(**prompts([4]), max_new_tokens=5, do_sample=do_sample)
    assert stats.tokens == 4 * 9 + 5
    assert len(stats.proposed) == len(stats.accepted) == 3
    assert all(0 <= a <= p for a, p in zip(stats.accepted, stats.proposed, strict=True))
    assert stats.proposed == sorted(stats.proposed, reverse=True)
    assert stats.steps <= stats.sample_steps <= 4 * stats.steps
    assert stats.tokens_per_step == stats.tokens / stats.sample_steps
    assert stats.tokens <= stats.sample_steps + sum(stats.accepted)
    assert stats.seconds["decode"] > 0
    assert stats.seconds["compile"] == 0
    assert json.loads(json.dumps(stats.to_dict())) == stats.to_dict()
    assert stats.to_dict()["tokens"] == 41
    assert "41" in str(stats)
    stats.plot(str(tmp_path / "stats.png"))
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
    stats.reset()
    assert stats.to_dict() == specdec.engine.stats.Stats().to_dict()
