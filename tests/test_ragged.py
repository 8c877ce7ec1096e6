"""Ragged batches: every sample drafts, accepts and ends at its own pace, and is what it would have been alone.

Source: EMS-SD, arXiv 2405.07542.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from side_by_side import Prompts, Tiny, wrap
from test_trees import near
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

import specdec.engine.loop
from specdec import TokenTree
from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.engine.control import Adaptive, Plan, Track
from specdec.engine.control.plan import Shape
from specdec.engine.laws import SamplingLaw
from specdec.engine.loop import Decoder
from specdec.engine.slots import Rows
from specdec.engine.state import Report
from specdec.engine.stats import Stats
from specdec.engine.text import Text
from specdec.graphs.compiled import CompiledSteps
from specdec.hf import laws, names
from specdec.hf.cache import Way
from specdec.hf.view import ModelView

NEW = 40
LENGTHS = [60, 1, 23, 2, 7, 41, 1, 12, 3, 55, 30, 5, 2, 17, 48, 9]
TREE, CHAIN = TokenTree.from_widths(2, 2, 1), TokenTree.chain(3)


@pytest.fixture(scope="module")
def drafts(tiny: Tiny) -> dict[str, dict[str, Any]]:
    """Options of `wrap`, by name."""
    draft = near(tiny("llama"))
    return {
        "none": {"draft": None},
        "ngram": {"draft": "ngram"},
        "model": {"draft": draft},
        "tree": {"draft": draft, "tree": TREE},
        "any depth": {"draft": draft, "tree": TREE, "adapt": None},
    }


@pytest.fixture(scope="module")
def alone(tiny: Tiny, prompts: Prompts) -> tuple[list[int], list[list[int]]]:
    """End-of-text ids, and each sample's new tokens as transformers writes them, the samples one by one."""
    model, inputs = tiny("llama"), prompts(LENGTHS)
    free = [
        model.generate(ids[mask.bool()][None], max_new_tokens=NEW)[0, length:].tolist()
        for ids, mask, length in zip(inputs["input_ids"], inputs["attention_mask"], LENGTHS, strict=True)
    ]
    eos = [free[0][0], free[2][13], free[5][25], free[8][38]]
    ends = [min((n for n, token in enumerate(text, 1) if token in eos), default=NEW) for text in free]
    assert min(ends) == 1
    assert max(ends) == NEW
    assert len(set(ends)) > 6, "the samples end together"
    return eos, [text[:n] for text, n in zip(free, ends, strict=True)]


@pytest.mark.parametrize("n_batch", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", ["none", "ngram", "model", "tree", "any depth"])
def test_greedy_texts_are_those_of_each_sample_alone(
    kind: str, n_batch: int, drafts: Any, alone: Any, model: PreTrainedModel, prompts: Prompts
) -> None:
    eos, expected = alone
    wrapped = wrap(model, **drafts[kind])
    first = {name: x[-n_batch:] for name, x in prompts(LENGTHS).items()}  # the last ones are padded most
    out = wrapped.generate(**first, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=0)
    width = first["input_ids"].shape[1]
    assert torch.equal(out[:, :width], first["input_ids"])
    for row, text in zip(out[:, width:].tolist(), expected[-n_batch:], strict=True):
        assert row == text + [0] * (len(row) - len(text))
    stats = wrapped.specdec.stats
    assert not stats.fallbacks
    assert stats.tokens == sum(map(len, expected[-n_batch:]))  # none was judged after its end
    if kind in ("model", "tree"):
        assert stats.accepted[0] > 0


@pytest.mark.parametrize("kind", ["ngram", "model", "tree"])
def test_a_seeds_text_is_the_same_in_any_company(
    kind: str, drafts: Any, model: PreTrainedModel, prompts: Prompts
) -> None:
    """In a batch, alone, and among texts that come and go."""
    wrapped, lengths = wrap(model, **drafts[kind]), LENGTHS[3:11]
    inputs = prompts(lengths, vocab=9)  # few words, so that n-grams are found
    settings = {"do_sample": True, "temperature": 1.2, "top_p": 0.95, "max_new_tokens": 20, "eos_token_id": [5, 6]}
    settings["pad_token_id"] = 0
    seeds = torch.arange(len(lengths)) * 2**55 + 3
    wrapped.specdec.seeds = seeds
    width = max(lengths)
    together = wrapped.generate(**inputs, **settings)[:, width:].tolist()
    assert len({tuple(row) for row in together}) == len(lengths)

    def trimmed(row: list[int], text: Tensor) -> None:
        assert row[: len(text)] == text.tolist()
        assert not any(row[len(text) :])

    texts = [ids[mask.bool()] for ids, mask in zip(*inputs.values(), strict=True)]
    for row, text, seed in zip(together, texts, seeds, strict=True):
        wrapped.specdec.seeds = seed
        trimmed(row, wrapped.generate(text[None], **settings)[0, len(text) :])
    wrapped.specdec.seeds = seeds
    for result in specdec.generate_many(wrapped, texts, max_batch_size=3, **settings):
        trimmed(together[result.index], result.tokens[len(texts[result.index]) :])
    assert not wrapped.specdec.stats.fallbacks


# What is in the caches.


class _AnyPlan(Adaptive):
    """Drafts as much, and lets as much be judged, as chance will have it."""

    def __init__(self, tree: TokenTree, depths: Sequence[int], adapts: bool, *_: object) -> None:
        super().__init__(Shape(tree, depths))
        self.chance = random.Random(0)

    def plan(self, samples: Sequence[Track]) -> Plan:
        depth = self.chance.choice((0, *self.shape.depths))
        allowed = tuple(self.chance.randint(0, self.shape.nodes_to[depth]) for _ in samples)
        return Plan(depth, allowed, len(samples) + self.chance.randint(0, sum(allowed)))


class _SeenRows(Rows):
    """The rows of the latest run are kept, to be looked at; a row that a text takes holds nothing of another's."""

    latest: _SeenRows

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        _SeenRows.latest = self

    def fill(self, n_rows: int) -> list[Text]:
        before = list(self._texts)
        failed = super().fill(n_rows)
        for row, (old, new) in enumerate(zip(before, self._texts, strict=True)):
            for layer in self._target.cache.layers if old is not new else ():
                layer.keys[:, row] = layer.values[:, row] = 0
        return failed

    def row_of(self, text: Text) -> int:
        return next(row for row, other in enumerate(self._texts) if other is text)


@pytest.fixture
def rows_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specdec.engine.loop, "Rows", _SeenRows)


def prefilled(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, [G, length, D] each, as the model itself caches them."""
    cache = names.cache_in(model(ids[None], use_cache=True))
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def assert_cached(view: ModelView, row: int, n: int, expected: list[tuple[Tensor, Tensor]]) -> None:
    """The first `n` slots of a row hold the first `n` tokens."""
    for layer, pair in zip(view.cache.layers, expected, strict=True):
        for cached, kept in zip((layer.keys, layer.values), pair, strict=True):
            torch.testing.assert_close(cached[:, row, :n], kept[:, :n], atol=1e-5, rtol=1e-5)


def texts_of(prompts: Prompts) -> list[Text]:
    inputs = prompts(LENGTHS)
    pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [Text(ids[mask.bool()], 6 + 5 * (i % 7), seed=i) for i, (ids, mask) in enumerate(pairs)]


def law_of(do_sample: bool = False) -> SamplingLaw:
    return laws.law_of(LogitsProcessorList(), do_sample, torch.device("cpu"))


def decoder_of(model: PreTrainedModel, tree: TokenTree | None, draft: PreTrainedModel | None, **more: Any) -> Decoder:
    drafter = NgramDrafter(4) if tree is None or draft is None else ModelDrafter(ModelView(draft), tree)
    return Decoder(ModelView(model), drafter, CompiledSteps(False), Stats(), **more)


@pytest.mark.usefixtures("rows_are_seen")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dense"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("tree", [TREE, CHAIN, None], ids=["tree", "chain", "ngram"])
@torch.no_grad()
def test_committed_entries_are_those_of_a_prefill(
    tree: TokenTree | None, do_sample: bool, fused: bool, model: PreTrainedModel, prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Texts join and end, and steps draft as it comes: nothing for some, parts of it for others."""
    monkeypatch.setattr(specdec.engine.loop, "policy_of", _AnyPlan)
    monkeypatch.setattr(specdec.engine.slots, "CHUNK", 16)
    # All of a chain is right, and the token after it has not been run; of a tree, some path.
    draft = near(model) if tree is TREE else model
    decoder = decoder_of(model, tree, draft)
    views = [decoder.target] if tree is None else [decoder.target, decoder.drafter.view]
    for view in views:
        view.cache.way = view.cache.way if fused else Way.MASKED
    n_looks = n_behind = 0
    law, eos = law_of(do_sample), torch.tensor([5, 6])
    for emitted in decoder.run(texts_of(prompts), 5, 100, 100, law, eos):
        rows = _SeenRows.latest
        for piece in emitted:
            text, row = piece.text, rows.row_of(piece.text)
            n = int(decoder.buffers.state.lengths[row])
            assert n == len(text.ids) - 1  # all but the pending token
            assert_cached(decoder.target, row, n, prefilled(model, text.ids))
            known = rows.unread({row: text}).get(row, n + 1)
            if tree is not None and known > 2:
                # The token before the pending one is written when next something is drafted.
                assert_cached(views[1], row, known - 2, prefilled(draft, text.ids))
            n_looks, n_behind = n_looks + 1, n_behind + (known <= n)
    assert n_looks > 60
    assert n_behind > 10 or tree is None
    if tree is not None:
        assert decoder.stats.accepted[1] > 0
    if tree is CHAIN:
        assert decoder.stats.accepted[-1] > 0


@pytest.mark.usefixtures("rows_are_seen")
@pytest.mark.parametrize("tree", [TREE, CHAIN], ids=["tree", "chain"])
@torch.no_grad()
def test_slots_do_not_depend_on_the_batch(tree: TokenTree, model: PreTrainedModel, prompts: Prompts) -> None:
    """A text's entries, and those of its drafts behind them, stand where they would alone: no neighbour pads it."""
    decoder = decoder_of(model, tree, near(model), adapt=False)

    def used(texts: list[Text], n_rows: int) -> list[list[int]]:
        """Slots of the target's cache that hold something, when each text has ended."""
        slots: dict[Text, list[int]] = {}
        for emitted in decoder.run(texts, n_rows, 100, 100, law_of(), torch.tensor([5, 6])):
            for piece in emitted:
                if piece.text.finished:
                    row = _SeenRows.latest.row_of(piece.text)
                    entries = [layer.keys[:, row, :-1].abs().amax((0, 2)) for layer in decoder.target.cache.layers]
                    slots[piece.text] = torch.stack(entries).amax(0).nonzero()[:, 0].tolist()
        return [slots[text] for text in texts]

    each = [used([text], 1)[0] for text in texts_of(prompts)]
    for n_rows in (2, 5, 16):
        texts = texts_of(prompts)
        together = used(texts, n_rows)
        assert together == each
    for slots, text in zip(together, texts, strict=True):
        assert slots == list(range(len(slots)))
        assert len(text.ids) - 1 <= len(slots) <= len(text.ids) - 1 + len(tree)


@pytest.mark.usefixtures("rows_are_seen")
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("kind", ["ngram", "chain", "tree"])
@torch.no_grad()
def test_a_step_of_a_draft_a_root_alone_and_nothing(
    kind: str, spare: int, model: PreTrainedModel, prompts: Prompts
) -> None:
    """One sample has a whole tree, one only its root (n_b = 1), and one has ended (n_b = 0).

    Args:
        spare: tokens of the forward that are nobody's.
    """
    tree = {"ngram": None, "chain": CHAIN, "tree": TREE}[kind]
    decoder = decoder_of(model, tree, model)  # all it drafts is right
    lengths = [9, 24, 6]
    inputs = prompts(lengths)
    ended, drafted, bare = (ids[mask.bool()] for ids, mask in zip(*inputs.values(), strict=True))
    drafted[12:], bare[-1] = drafted[:12], 96  # n-grams find something, and nothing
    assert 96 not in bare[:-1]
    texts = [Text(prompt, 12) for prompt in (ended, drafted, bare)]
    state = decoder.buffers.open(3, 40, 40, torch.tensor([-1]))
    rows = Rows(iter(texts), state, decoder.target, decoder.drafter, decoder.buffers.grow)
    assert not rows.fill(3)
    assert not rows.write()
    rows.read(rows.live, rows.live)
    state.stop(0)
    n_drafted = len(decoder.tree) - 1
    state.allowed.copy_(torch.tensor([n_drafted, n_drafted, n_drafted if kind == "ngram" else 0]))
    decoder.step.draft(state, law_of(), decoder.launcher.count(2 if tree is not None else 3), decoder.tree.depth)
    before = [(layer.keys[:, 0].clone(), layer.values[:, 0].clone()) for layer in decoder.target.cache.layers]
    report = decoder.step.judge(state, law_of(), decoder.launcher.count(2 + n_drafted + spare)).tolist()
    n_new, n_judged = zip(*((len(said.tokens), said.n_judged) for said in map(Report.of, report)), strict=True)
    assert n_judged == (0, n_drafted, 0)
    assert n_new[0] == 0
    assert n_new[1] == decoder.tree.depth + 1 if tree is not None else n_new[1] >= 1
    assert n_new[2] == 1
    assert state.lengths.tolist() == [8, 23 + n_new[1], 5 + 1]
    for layer, (keys, values) in zip(decoder.target.cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, 0, :-1], keys[:, :-1])  # but for scratch
        assert torch.equal(layer.values[:, 0, :-1], values[:, :-1])
    for row, prompt in ((1, drafted), (2, bare)):
        out = model.generate(prompt[None], max_new_tokens=n_new[row])[0]
        assert report[row][: n_new[row]] == out[len(prompt) :].tolist()
        assert_cached(decoder.target, row, int(state.lengths[row]), prefilled(model, out))
