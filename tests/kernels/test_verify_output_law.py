"""Verification is lossless: by exact enumeration of every drafted tree and every coin.

The enumeration runs what is defined, in float64, on trees of few nodes; what it is made of is proved for larger ones in
test_tree_rules.py. A coin comes up either way, and what follows has its probability.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import oracle
import pytest
import torch
from oracle import KINDS, Number, Process, Rule, Text, drafted_trees, random_process, rule_of_mixed
from torch import Tensor
from trees import N_HUBS, WALKS, TreeCase

from specdec.engine.tree import TokenTree
from specdec.kernels.verify import verify_tree as module
from specdec.kernels.verify.verify_tree import verify_tree_reference

pytestmark = pytest.mark.kernels


class Coins:
    """Coins that come up as told, and one way first and then the other where nothing was told."""

    def __init__(self) -> None:
        self.told: list[bool] = []
        self.tossed: list[tuple[bool, float]] = []

    def __lt__(self, probability: Tensor) -> bool:
        """A coin accepts, or does not, with a positive probability."""
        p = float(probability)
        n = len(self.tossed)
        accepts = self.told[n] if n < len(self.told) else p > 0
        self.tossed.append((accepts, p if accepts else 1 - p))
        return accepts

    def outcomes(self, case: TreeCase, sequence: bool) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
        """What verification gives for all ways that its coins may come up, with their probabilities."""
        waiting: list[list[bool]] = [[]]
        while waiting:
            self.told, self.tossed = waiting.pop(), []
            out = verify_tree_reference(*case.arguments(sequence))
            weight = 1.0
            for i, (accepts, p) in enumerate(self.tossed):
                if i >= len(self.told) and accepts and p < 1:
                    waiting.append([accepted for accepted, _ in self.tossed[:i]] + [False])
                weight *= p
            yield weight, out


def case_of(process: Process, rule: Rule, tree: TokenTree, texts: tuple[Text | None, ...], n_nodes: int) -> TreeCase:
    """One sample whose nodes follow these texts. Supports are in no order, entries that do not belong to them hold an
    id of one that does, and nodes that do not exist have the root's laws."""
    vocab, n_all = process.vocab, len(tree)
    entries = torch.randperm(vocab + 1, generator=torch.Generator().manual_seed(len(texts))).tolist()
    ids, probs, n_hubs, places = [], [], [], []
    for node in tree.inner:
        law = process.draft[texts[node] or ()]
        listed = [x for x, q in enumerate(law) if q]
        own = [entry if entry < vocab and law[entry] else None for entry in entries]
        ids.append([listed[0] if entry is None else entry for entry in own])
        probs.append([0.0 if entry is None else float(law[entry]) for entry in own])
        own_rule = rule_of_mixed(law) if rule is oracle.MIXED else rule
        n_hubs.append(N_HUBS[own_rule](tree.n_children[node]))
        places += [-1 if texts[child] is None else own.index(texts[child][-1]) for child in tree.children(node)]
    logits = torch.tensor([[float(p) for p in process.target[text or ()]] for text in texts], dtype=torch.float64).log()
    zeros, one = torch.zeros(n_all, dtype=torch.float64), torch.ones(1, dtype=torch.int64)
    return TreeCase(
        logits, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), zeros, zeros - torch.inf, zeros.long(),
        tree.topology(torch.device("cpu")), torch.tensor([places]), one * n_nodes, torch.tensor([ids]),
        torch.tensor([probs], dtype=torch.float64), torch.tensor([n_hubs]), one, one, one.new_tensor([0, n_all]),
        tree.depth,
    )  # fmt: skip


def check_law(
    process: Process, rule: Rule, widths: tuple[int, ...], sequence: bool, coins: Coins, n_levels: int | None = None
) -> None:
    """The tokens of a step, followed by the target's, follow the target's law, where `n_levels` are drafted."""
    tree, drafted = TokenTree.from_widths(*widths), widths[:n_levels]
    n_nodes = len(TokenTree.from_widths(*drafted))
    law: defaultdict[Text, Number] = defaultdict(float)
    for texts, drawn in drafted_trees(process, drafted, rule).items():
        texts += (None,) * (len(tree) - n_nodes)
        for prob, (path, n_accepted, row, ids, weights) in coins.outcomes(
            case_of(process, rule, tree, texts, n_nodes), sequence
        ):
            end = path[0].tolist()[-1]
            text, depth = texts[end], tree.depths[end]
            assert text is not None
            assert row.tolist() == [end]
            assert n_accepted.tolist() == [depth]
            assert [texts[node] for node in path[0].tolist()] == [text[: min(d, depth)] for d in range(tree.depth + 1)]
            own = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
            target = [float(p) for p in process.target[text]]
            left = [own.get(x, p) for x, p in enumerate(target)]
            left = left if any(left) else target  # see `draw_row`: only rounding leaves nothing
            for x, mass in enumerate(left):
                law[(*text, x)] += float(drawn) * prob * mass / sum(left)
    length = len(widths) + 1
    whole, expected = process.completed(law, length), process.target_law(length)
    assert whole.keys() <= expected.keys()
    assert max(abs(float(mass) - float(whole.get(text, 0))) for text, mass in expected.items()) < 1e-12


@pytest.fixture
def coins(monkeypatch: pytest.MonkeyPatch) -> Coins:
    coins = Coins()
    monkeypatch.setattr(module, "_coin", lambda *key: coins)
    return coins


RULES = pytest.mark.parametrize("rule", oracle.RULES.values(), ids=oracle.RULES)


@WALKS
@RULES
@pytest.mark.parametrize(("widths", "vocab"), [((1, 1), 4), ((1, 1, 1), 2), ((3,), 4), ((2, 1), 3), ((1, 2), 3)])
def test_output_law_is_exactly_the_targets(
    widths: tuple[int, ...], vocab: int, rule: Rule, sequence: bool, coins: Coins
) -> None:
    for seed, kind in enumerate(KINDS * 3):
        check_law(random_process(seed, len(widths), vocab, kind), rule, widths, sequence, coins)


@WALKS
@RULES
def test_output_law_of_a_binary_tree(rule: Rule, sequence: bool, coins: Coins) -> None:
    for seed in range(8):
        check_law(random_process(seed, 2, 3), rule, (2, 2), sequence, coins)


@WALKS
@RULES
@pytest.mark.parametrize("n_levels", [0, 1, 2])
def test_output_law_with_fewer_levels_than_the_tree(n_levels: int, rule: Rule, sequence: bool, coins: Coins) -> None:
    for seed in range(6):
        check_law(random_process(seed, 3, 3), rule, (1, 2, 1), sequence, coins, n_levels)
