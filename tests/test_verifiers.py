"""Sampling with every verifier: the target's law whatever drafts and however it is verified."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from side_by_side import Prompts, Tiny, wrap
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec import TokenTree
from specdec.drafters.none import NoDrafter
from specdec.engine.draft import Draft
from specdec.kernels.sampling.draw_children import draw_children
from specdec.kernels.sampling.noise import DRAFT
from specdec.verifiers import VERIFIERS
from specdec.verifiers.base import DraftLaw

VOCAB, N_NEW, N_SAMPLES = 6, 3, 3000
PROMPTS = torch.tensor([[0, 0, 3, 1, 2], [4, 2, 4, 4, 2]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
LAWS: dict[str, dict[str, Any]] = {"plain": {"top_k": 0}, "cut": {"temperature": 1.4, "top_k": 5, "top_p": 0.9}}
WARPERS = {"plain": [], "cut": [TemperatureLogitsWarper(1.4), TopKLogitsWarper(5), TopPLogitsWarper(0.9)]}
TREES = {
    "chain": TokenTree.chain(2),
    "ragged": TokenTree((-1, 0, 0, 0, 1, 1, 2)),
    "deep": TokenTree((-1, 0, 0, 2, 2, 3)),  # the second child goes on
}
BLOCK_TREE = ("block", "ragged")  # the one combination there is not


@pytest.fixture(scope="module")
def target(tiny: Tiny) -> PreTrainedModel:
    return tiny("llama", vocab_size=VOCAB, num_hidden_layers=1, hidden_size=8, intermediate_size=8, head_dim=4,
                num_attention_heads=2, num_key_value_heads=1)  # fmt: skip


@pytest.fixture(scope="module")
def draft(tiny: Tiny) -> PreTrainedModel:
    return tiny("gpt2", vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=2, initializer_range=0.3)


def exact_law(model: PreTrainedModel, prompt: Tensor, law: str) -> Tensor:
    """The law of all texts of `N_NEW` tokens after a prompt, from the plain model and transformers' warpers."""
    texts = torch.tensor(list(itertools.product(range(VOCAB), repeat=N_NEW)))
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(texts), -1), texts], 1)).logits[:, -N_NEW - 1 : -1].float()
    scores = LogitsProcessorList(WARPERS[law])(None, logits.flatten(0, 1)).view_as(logits)
    return scores.softmax(-1).double().gather(2, texts[..., None])[..., 0].prod(-1)


def check_law(wrapped: PreTrainedModel, model: PreTrainedModel, law: str, n_calls: int = 1) -> None:
    """Texts of the wrapped model, written in so many calls, follow the exact law, all tokens together."""
    seeds = torch.arange(len(PROMPTS) * N_SAMPLES).chunk(n_calls)
    place_values, written = VOCAB ** torch.arange(N_NEW).flip(0), []
    for wrapped.specdec.seeds in seeds:
        out = wrapped.generate(
            PROMPTS, attention_mask=MASK, do_sample=True, max_new_tokens=N_NEW,
            num_return_sequences=N_SAMPLES // n_calls, **LAWS[law],
        )  # fmt: skip
        written.append((out[:, PROMPTS.shape[1] :] * place_values).sum(1).view(len(PROMPTS), -1))
    assert not wrapped.specdec.stats.fallbacks
    texts = torch.cat(written, 1)
    for row, (prompt, mask) in enumerate(zip(PROMPTS, MASK, strict=True)):
        expected = exact_law(model, prompt[mask.bool()], law) * N_SAMPLES
        observed = texts[row].bincount(minlength=VOCAB**N_NEW)
        assert observed[expected == 0].sum() == 0
        common = expected >= 5
        observed, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (observed, expected))
        keep = expected > 0
        observed, expected = observed[keep], expected[keep]
        assert len(expected) > 20
        assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("verifier", "shape", "law"),
    [
        *((v, "ragged", "cut") for v in VERIFIERS if (v, "ragged") != BLOCK_TREE),
        *((v, "deep", "plain") for v in ("auto", "traversal", "rrs")),
        *((v, "chain", "plain") for v in VERIFIERS),
    ],
)
def test_texts_follow_the_exact_law(
    verifier: str, shape: str, law: str, target: PreTrainedModel, draft: PreTrainedModel, monkeypatch: Any
) -> None:
    monkeypatch.setattr("specdec.drafters.model.SUPPORT_SIZE", 4)  # fewer than the vocabulary, as ever outside tests
    wrapped = wrap(target, draft, verifier=verifier, tree=TREES[shape])
    check_law(wrapped, target, law)
    for reached, *taken in wrapped.specdec.stats.slots.values():
        assert min(taken) > 0, "a child that is never accepted tests nothing"
        assert sum(taken) < reached


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_ngrams_keep_the_law_with_every_verifier(verifier: str, target: PreTrainedModel) -> None:
    wrapped = wrap(target, "ngram", verifier=verifier, depth=2)
    check_law(wrapped, target, "cut")
    assert 0 < wrapped.specdec.stats.accepted[1] < wrapped.specdec.stats.proposed[1]


# Other drafters.


class _Repeats(NoDrafter):
    """Proposes what follows from the pending token without chance, some of it twice among siblings."""

    tree = TREES["ragged"]
    depths = (tree.depth,)

    def draft(self, state: Any, law: Any, live: Tensor, depth: int) -> Draft:
        steps = torch.tensor([1, 1, 2, 3, 3, 0], device=live.device)
        counts = torch.where(state.pending % 3 == 0, 3, 6)  # one level, or both
        return Draft((state.pending[:, None] + steps) % VOCAB, counts)


@dataclass
class _Table(NoDrafter):
    """Draws from a law of its own that looks at nothing but the parent's token: a hub, and the others drawn."""

    n_hubs: int
    tree = TREES["ragged"]
    depths = (tree.depth,)
    support_size = VOCAB

    def draft(self, state: Any, law: Any, live: Tensor, depth: int) -> Draft:
        generator = torch.Generator().manual_seed(3)
        table = torch.rand(VOCAB, VOCAB, generator=generator).square()
        table[:, 5] = 0  # a token that is never drafted
        probs, ids = (table / table.sum(1, keepdim=True)).sort(1, descending=True)
        tokens = {0: state.pending}
        places, laws = [], []
        for node in self.tree.inner:
            own, children = tokens[node], self.tree.children(node)
            counts = torch.full_like(own, len(children))
            keys = state.seeds, state.lengths + self.tree.depths[node] + 1, torch.full_like(own, node)
            hubs = (counts - 1).clamp(max=self.n_hubs)
            drawn = draw_children(ids[own], probs[own], hubs, counts, *keys, DRAFT, len(children), False)
            places.append(drawn)
            laws.append((ids[own], probs[own], hubs))
            for k, child in enumerate(children):
                tokens[child] = ids[own].gather(1, drawn[:, k : k + 1].clamp(min=0))[:, 0]
        drafted = torch.stack([tokens[node] for node in range(1, len(self.tree))], 1)
        drafted_law = DraftLaw(torch.cat(places, 1), *(torch.stack(x, 1) for x in zip(*laws, strict=True)))
        return Draft(drafted, torch.full_like(state.lengths, len(self.tree) - 1), drafted_law)


@pytest.mark.parametrize("verifier", ["auto", "rrsw", "target", "coupled"])
def test_a_drafter_without_a_law_keeps_the_targets(verifier: str, target: PreTrainedModel) -> None:
    wrapped = wrap(target, _Repeats(), verifier=verifier)
    check_law(wrapped, target, "plain")
    stats = wrapped.specdec.stats
    _, first, repeated, other = stats.slots[3]
    assert first > 0
    assert repeated == 0 or verifier == "coupled"  # which follows the deepest of equal paths
    assert other > 0
    assert 0 < stats.accepted[1] < stats.proposed[1] < stats.proposed[0]


@pytest.mark.parametrize("verifier", ["auto", "spechub", "coupled"])
@pytest.mark.parametrize("n_hubs", [0, 1])
def test_a_drafter_with_a_law_keeps_the_targets(n_hubs: int, verifier: str, target: PreTrainedModel) -> None:
    wrapped = wrap(target, _Table(n_hubs), verifier=verifier)
    check_law(wrapped, target, "cut")
    assert all(min(counts) > 0 for counts in wrapped.specdec.stats.slots.values())


# Seeds.

SEEDS = [11, 22, 33, 2**61 + 5]


@pytest.mark.parametrize(
    ("verifier", "shape"), [(v, shape) for v in VERIFIERS for shape in ("chain", "ragged") if (v, shape) != BLOCK_TREE]
)
def test_a_text_does_not_depend_on_its_neighbours(
    verifier: str, shape: str, target: PreTrainedModel, draft: PreTrainedModel, prompts: Prompts
) -> None:
    wrapped = wrap(target, draft, verifier=verifier, tree=TREES[shape])
    inputs = prompts([12, 2, 1, 6], vocab=VOCAB)

    def sample(rows: list[int]) -> list[list[int]]:
        wrapped.specdec.seeds = [SEEDS[r] for r in rows]
        own = {name: x[rows] for name, x in inputs.items()}
        return wrapped.generate(**own, do_sample=True, temperature=1.5, max_new_tokens=14)[:, 12:].tolist()

    together = sample([0, 1, 2, 3])
    assert len({tuple(text) for text in together}) == 4
    assert 0 < sum(wrapped.specdec.stats.accepted) < sum(wrapped.specdec.stats.proposed)
    assert sample([3, 1]) == [together[3], together[1]]
    for row in range(4):
        assert sample([row]) == [together[row]]


@pytest.mark.parametrize("law", LAWS)
def test_coupled_texts_are_those_without_a_draft(
    law: str, target: PreTrainedModel, draft: PreTrainedModel, prompts: Prompts
) -> None:
    drafters: list[tuple[Any, TokenTree | None]] = [
        (None, None),
        ("ngram", None),
        (_Repeats(), None),
        (_Table(1), None),
    ]
    drafters += [(model, tree) for model in (target, draft) for tree in TREES.values()]
    texts = []
    for drafter, tree in drafters:
        wrapped = wrap(target, drafter, verifier="coupled", tree=tree)
        wrapped.specdec.seeds = SEEDS
        inputs = prompts([12, 2, 1, 6], vocab=VOCAB)
        texts.append(wrapped.generate(**inputs, do_sample=True, max_new_tokens=25, **LAWS[law]))
        if drafter is not None:
            assert wrapped.specdec.stats.accepted[0] > 0
        if drafter is target:  # whose first draw is the target's own
            assert wrapped.specdec.stats.acceptance_by_position[0] == 1
    assert all(torch.equal(text, texts[0]) for text in texts)
