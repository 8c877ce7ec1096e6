"""Where tree verification goes wrong: each of these mistakes has been made by someone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from trees import RAGGED, RULES, WALKS, bonus_of, check_decisions, tree_case

from specdec.engine.tree import TokenTree
from specdec.kernels.sampling.noise import ACCEPT, uniform_reference
from specdec.kernels.verify import verify_tree as module
from specdec.kernels.verify.tree_rules import WITH_REPLACEMENT
from specdec.kernels.verify.verify_tree import verify_tree, verify_tree_reference

pytestmark = pytest.mark.kernels


@WALKS
@RULES
def test_rejected_children_are_not_left(n_hubs: int, sequence: bool, device: torch.device) -> None:
    """Whoever could have been the path's next token and was not is no bonus token: the residual has lost it."""
    case = tree_case(TokenTree.from_widths(3, 2), 10, 12, 6, n_hubs, seed=1, spread=2.0)
    path, _, _, ids, weights = (x.cpu() for x in verify_tree(*case.on(device).arguments(sequence)))
    n_rejected = 0
    for b, end in enumerate(path[:, -1].tolist()):
        if end < 4:
            places = case.places[b, 0:3] if end == 0 else case.places[b, 2 * end + 1 : 2 * end + 3]
            own = places[places >= 0]
            assert (weights[b, own] == 0).all()
            assert (ids[b, own] >= 0).all()
            n_rejected += len(own)
    assert n_rejected > 5


@WALKS
@RULES
def test_what_the_target_rules_out_is_rejected_at_the_smallest_coin(
    n_hubs: int, sequence: bool, device: torch.device
) -> None:
    """And what the draft law rules out, though it stands in the support."""
    seeds, one = torch.arange(1_000_000), torch.ones(1_000_000, dtype=torch.int64)
    coins = torch.stack([uniform_reference(seeds, one, one * node, ACCEPT) for node in (1, 2)])
    assert coins.min() < 1e-5
    case = tree_case(TokenTree.from_widths(2), 4, 30, 4, n_hubs)
    case.seed, case.position[:] = coins.topk(2, largest=False).indices.flatten(), 1
    case.places[:] = torch.tensor([1, 3])
    case.support_ids[:] = torch.tensor([5, 6, 7, 8])
    case.support_probs[:] = torch.tensor([0.25, 0.25, 0.25, 0.25])
    case.logits[:, [6, 8]] = -math.inf
    case.set_logits(case.logits)
    assert (check_decisions(case, sequence, device)[1] == 0).all()
    case.set_logits(torch.zeros_like(case.logits))
    case.support_probs[:] = torch.tensor([0.5, 0.0, 0.5, 0.0])
    assert (check_decisions(case, sequence, device)[1] == 0).all()


def test_only_the_residual_is_left(device: torch.device) -> None:
    """The support has all of the law's mass, in two blocks of the vocabulary."""
    case = tree_case(TokenTree.chain(1), 16, 5000, 4, WITH_REPLACEMENT)
    case.logits[:] = -math.inf
    case.logits[:, [4095, 4096, 4097, 4999]] = torch.tensor([0.2, 0.4, 0.15, 0.25]).log()
    case.set_logits(case.logits)
    case.support_ids[:] = torch.tensor([4999, 4097, 4095, 4096])
    case.support_probs[:] = torch.tensor([0.0, 0.1, 0.4, 0.5])
    case.places[:] = torch.tensor([2, 3]).repeat(8)[:, None]
    check_decisions(case, False, device)
    _, n_accepted, bonus = bonus_of(case, False, device)
    assert set(n_accepted.tolist()) == {0, 1}
    assert set(bonus[n_accepted == 0].tolist()) == {4097, 4999}


@WALKS
def test_a_residual_lost_to_rounding_leaves_the_target(sequence: bool, device: torch.device) -> None:
    """As if rounding had made the target less than its draft law everywhere: rejected, and nothing is left."""
    case = tree_case(TokenTree.chain(1), 16, 5000, 3, 0)
    case.logits[:] = -math.inf
    case.logits[:, [0, 4200, 4999]] = torch.tensor([0.25, 0.25, 0.5]).log()
    case.set_logits(case.logits)
    case.log_total += 1.5
    case.support_ids[:] = torch.tensor([0, 4200, 4999])
    case.support_probs[:] = torch.tensor([0.25, 0.25, 0.5])
    case.places[:] = 2
    weights = check_decisions(case, sequence, device)[4]
    assert (weights == 0).all()
    _, n_accepted, bonus = bonus_of(case, sequence, device)
    assert set(n_accepted.tolist()) == {0, 1}
    assert set(bonus[n_accepted == 0].tolist()) == {0, 4200, 4999}


@WALKS
def test_laws_of_nan_harm_no_other_sample(sequence: bool, device: torch.device) -> None:
    case = tree_case(TokenTree.from_widths(2, 2), 8, 5000, 4, spread=0.5)
    expected = verify_tree_reference(*case.arguments(sequence))
    logits = case.logits.clone()
    logits[7, 77] = math.nan  # sample 1's root
    logits[[3 * 7 + 1, 3 * 7 + 2], 5] = math.nan  # sample 3's inner nodes
    case.set_logits(logits)
    got = check_decisions(case, sequence, device)
    others = torch.tensor([0, 2, 4, 5, 6, 7])
    assert all(torch.equal(a[others], b[others]) for a, b in zip(got, expected, strict=True))
    _, n_accepted, bonus = bonus_of(case, sequence, device)
    assert n_accepted[1] == 0
    assert (bonus.clamp(0, 4999) == bonus).all()


@WALKS
@RULES
def test_a_draft_law_of_nan_costs_the_draft_and_nothing_else(
    n_hubs: int, sequence: bool, device: torch.device
) -> None:  # fmt: skip
    case = tree_case(TokenTree.from_widths(2), 8, 5000, 3, n_hubs)
    case.logits[:] = -math.inf
    case.logits[:, [3, 4, 4500]] = torch.tensor([0.2, 0.4, 0.4]).log()
    case.set_logits(case.logits)
    case.support_ids[:] = torch.tensor([3, 4, 4500])
    case.support_probs[:] = math.nan
    case.places[:] = torch.tensor([0, 1])
    check_decisions(case, sequence, device)
    _, n_accepted, bonus = bonus_of(case, sequence, device)
    assert (n_accepted == 0).all()
    assert {4, 4500} <= set(bonus.tolist()) <= {3, 4, 4500}
    case.support_probs[..., 1:] = 0.5
    check_decisions(case, sequence, device)


@WALKS
def test_no_coin_is_ever_tossed_twice(sequence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a sample's successive steps, wherever their paths end, nobody sees one (position, node) twice."""
    seen: list[tuple[int, int]] = []
    generator = torch.Generator().manual_seed(0)

    def coin(seed: Tensor, position: Tensor, node: Tensor) -> Tensor:
        seen.append((int(position), int(node)))
        return torch.rand((), generator=generator)

    monkeypatch.setattr(module, "_coin", coin)
    position, ends = 1, set()
    for step in range(60):
        case = tree_case(RAGGED, 1, 8, 5, seed=step, spread=0.3)
        case.position[:] = position
        path, n_accepted, *_ = verify_tree_reference(*case.arguments(sequence))
        position += int(n_accepted) + 1
        ends.add(int(path[0, -1]))
    assert {RAGGED.depths[end] for end in ends} >= {0, 1, 2, 3}
    assert len(ends) > 5
    assert len(seen) == len(set(seen)) > 100
