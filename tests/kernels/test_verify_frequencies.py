"""Verification is lossless: by the frequencies of what is emitted, on the real ops with the real noise."""

from __future__ import annotations

import math

import pytest
import torch
from frequencies import P_VALUE, in_bulk, p_value
from rows import OFF, Knobs
from torch import Tensor
from trees import RAGGED, RULES, WALKS, TreeCase, bonus_of, check_decisions, tree_case

from specdec.engine.tree import TokenTree
from specdec.kernels.sampling.draw import draw
from specdec.kernels.sampling.draw_children import draw_children
from specdec.kernels.sampling.noise import DRAFT
from specdec.kernels.sampling.row_law import row_law, row_probs
from specdec.kernels.sampling.top_support import top_support

pytestmark = pytest.mark.kernels

N_TEXTS = 48_000


def _draft(
    proposal: Tensor, rows: Tensor, n_hubs: int, size: int, n_children: int, seed: Tensor, position: Tensor, node: int
) -> tuple[Tensor, ...]:
    """Children of one node of all samples, whose draft logits are `proposal[rows]`: tokens, places and law."""
    neutral = torch.tensor([1.0, 1.0, 0.0], device=rows.device)
    ids, probs = (x[rows] for x in top_support(proposal, neutral, 0, size))
    full = torch.full_like(rows, n_hubs), torch.full_like(rows, n_children)
    key = seed, position, torch.full_like(rows, node)
    places = draw_children(ids, probs, *full, *key, DRAFT, n_children, False)
    return ids.gather(1, places.clamp(min=0)), places, ids, probs


@in_bulk
@WALKS
@RULES
@pytest.mark.parametrize(
    ("vocab", "size", "dtype", "setting"),
    [(4, 3, torch.float32, OFF), (9, 4, torch.bfloat16, (0.8, 0.9, 0.05, 5)), (3, 1, torch.float32, OFF)],
)
def test_what_trees_emit_follows_the_target(
    n_hubs: int, vocab: int, size: int, dtype: torch.dtype, setting: Knobs, sequence: bool, device: torch.device
) -> None:
    """Triples of tokens from binary trees, of which a third of the samples have one level, and a third none."""
    generator = torch.Generator().manual_seed(vocab)
    n_rows = 1 + vocab + vocab**2  # row 1 + x follows token x, row 1 + vocab + vocab * x + y follows x and y
    logits = (torch.rand(n_rows, vocab, generator=generator) ** 2 + 0.02).log().to(dtype)
    logits[0, 1] = logits[3, 2] = -math.inf
    proposal = (logits.float().clamp(min=-3) + 2 * torch.rand(n_rows, vocab, generator=generator)).to(device)
    logits, knobs = logits.to(device), torch.tensor(setting[:3], device=device)
    law = row_law(logits, knobs, setting[3])
    target = row_probs(logits, knobs, *law)

    seed = torch.arange(N_TEXTS, device=device)
    position, zero, tree = seed % 5 + 3, torch.zeros_like(seed), TokenTree.from_widths(2, 2)
    nodes = [_draft(proposal, zero, n_hubs, size, 2, seed, position, 0)]
    after = nodes[0][0]  # [B, 2], the first level
    nodes += [_draft(proposal, 1 + after[:, i], n_hubs, size, 2, seed, position + 1, 1 + i) for i in range(2)]
    tokens, places = (torch.cat(x, 1) for x in list(zip(*nodes, strict=True))[:2])
    support = [torch.stack(x, 1) for x in list(zip(*nodes, strict=True))[2:]]
    below = 1 + vocab + vocab * after.repeat_interleave(2, 1) + tokens[:, 2:]
    rows = torch.cat([zero[:, None], 1 + after, below], 1).flatten()
    n_nodes = torch.tensor([1, 3, 7], device=device)[seed % 3]
    case = TreeCase(
        logits[rows], knobs, *(x[rows] for x in law), tree.topology(device), places, n_nodes, *support,
        torch.full_like(places[:, :3], n_hubs), seed, position, torch.arange(N_TEXTS + 1, device=device) * 7,
        tree.depth,
    )  # fmt: skip
    path, n_accepted, bonus = bonus_of(case, sequence, device)

    emitted = torch.cat([torch.gather(tokens, 1, (path[:, 1:] - 1).clamp(min=0)), zero[:, None]], 1)
    emitted.scatter_(1, n_accepted[:, None], bonus[:, None])
    x, y, z = emitted.T
    other = 17 + DRAFT  # a stream nobody uses: the next step, had it been run
    y = torch.where(n_accepted >= 1, y, draw(target[1 + x], seed, position + 1, zero, other))
    z = torch.where(n_accepted >= 2, z, draw(target[1 + vocab + vocab * x + y], seed, position + 2, zero, other))
    pairs = target[0][:, None] * target[1 : 1 + vocab]
    expected = (pairs[..., None] * target[1 + vocab :].view(vocab, vocab, vocab)).flatten().cpu()
    for levels in range(3):
        own = n_nodes == (1, 3, 7)[levels]
        assert n_accepted[own].max() == levels
        counts = ((x * vocab + y) * vocab + z)[own].bincount(minlength=vocab**3).cpu()
        assert p_value(counts, expected) > P_VALUE


@in_bulk
@WALKS
@RULES
def test_frequencies_over_several_blocks(n_hubs: int, sequence: bool, device: torch.device) -> None:
    """Twelve tokens in four blocks of the vocabulary, more than half of them in the support."""
    vocab, n_texts = 13_000, 6000
    own = torch.tensor([3, 4, 4000, 4095, 4096, 4097, 8000, 8191, 8192, 12_287, 12_288, 12_999])
    generator = torch.Generator().manual_seed(n_hubs)
    logits = torch.full((4, vocab), -9.0)
    logits[:, own] = torch.rand(12, generator=generator) * 2
    logits, knobs = logits.to(device), torch.tensor([1.3, 1.0, 0.0], device=device)
    law = row_law(logits, knobs, 12)
    target = row_probs(logits, knobs, *law)[0].cpu()
    assert set(target.nonzero()[:, 0].tolist()) == set(own.tolist())
    seed = torch.arange(n_texts, 2 * n_texts, device=device)
    position, zero = seed % 7 + 2, torch.zeros_like(seed)
    proposal = torch.full((1, vocab), -math.inf)
    proposal[0, own] = torch.rand(12, generator=generator) * 3
    tokens, places, ids, probs = _draft(proposal.to(device), zero, n_hubs, 7, 3, seed, position, 0)
    case = TreeCase(
        logits, knobs, *law, TokenTree.from_widths(3).topology(device), places, zero + 4, ids[:, None], probs[:, None],
        zero[:, None] + n_hubs, seed, position, torch.zeros(n_texts + 1, dtype=torch.int64, device=device), 1,
    )  # fmt: skip
    path, n_accepted, bonus = bonus_of(case, sequence, device)
    first = torch.where(n_accepted > 0, tokens.gather(1, (path[:, 1:] - 1).clamp(min=0))[:, 0], bonus)
    assert 500 < n_accepted.sum() < n_texts - 500
    assert p_value(first.bincount(minlength=vocab).cpu(), target) > P_VALUE


@in_bulk
@WALKS
@RULES
def test_a_draft_law_of_nan_leaves_the_targets_frequencies(n_hubs: int, sequence: bool, device: torch.device) -> None:
    case = tree_case(TokenTree.from_widths(2), 4000, 3, 3, n_hubs)
    law = torch.tensor([0.2, 0.0, 0.8])
    case.set_logits(law.log().expand(12_000, 3).contiguous())
    case.support_probs[:] = math.nan
    case.places[:] = torch.tensor([0, 2])
    _, n_accepted, bonus = bonus_of(case, sequence, device)
    assert (n_accepted == 0).all()
    assert p_value(bonus.bincount(minlength=3).cpu(), law) > P_VALUE


@WALKS
def test_what_the_law_cuts_is_never_emitted(sequence: bool, device: torch.device) -> None:
    """Drafts from laws that are not cut, against ones that are: at all nodes, accepted or not."""
    n_cut = 0
    for seed, vocab in enumerate((60, 5000)):
        case = tree_case(RAGGED, 8, vocab, 14, seed=seed, spread=0.5)
        case.knobs = torch.tensor([1.0, 0.8, 0.0])
        case.set_logits(case.logits.round(), 7)  # the cut falls among equals
        laws = row_probs(case.logits, case.knobs, case.log_total, case.threshold, case.first).view(8, 12, vocab)
        check_decisions(case, sequence, device)
        path, _, bonus = (x.cpu() for x in bonus_of(case, sequence, device))
        parents = torch.tensor(RAGGED.parents[1:])
        entries = case.topology[4, parents]
        tokens = case.support_ids[:, entries].gather(2, case.places.clamp(min=0)[..., None])[..., 0]
        probs = laws[:, parents].gather(2, tokens[..., None])[..., 0]
        n_cut += int(((probs == 0) & (case.places >= 0)).sum())
        accepted = torch.zeros(8, 12, dtype=torch.bool).scatter(1, path, True)[:, 1:]
        assert (probs[accepted] > 0).all()
        assert (laws[torch.arange(8), path[:, -1], bonus] > 0).all()
    assert n_cut > 10
