"""Verification is lossless: by the frequencies of what is emitted, on the real ops with the real noise."""

from __future__ import annotations

import math

import pytest
import torch
from chains import chain_case, check_decisions, law_rows, on, verify_chain
from frequencies import N_DRAWS, P_VALUE, in_bulk, p_value
from rows import OFF, Knobs

from specdec.kernels.draw import draw
from specdec.kernels.noise import DRAFT
from specdec.kernels.row_law import row_law, row_law_reference, row_probs
from specdec.kernels.top_support import top_support

pytestmark = pytest.mark.kernels


@in_bulk
@pytest.mark.parametrize("support_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("vocab", "dtype", "setting"),
    [(4, torch.float32, OFF), (9, torch.bfloat16, (0.8, 0.9, 0.05, 5))],
)
def test_draft_and_verify_frequencies(
    support_size: int, vocab: int, dtype: torch.dtype, setting: Knobs, device: torch.device
) -> None:
    """Two drafted places, drawn and verified with the real noise: pairs of tokens follow the target's law."""
    generator = torch.Generator().manual_seed(support_size)
    logits = (torch.rand(1 + vocab, vocab, generator=generator) ** 2).log().to(dtype)  # row 1 + x follows token x
    logits[0, 1] = logits[3, 2] = -math.inf
    logits = logits.to(device)
    knobs, top_k = torch.tensor(setting[:3], device=device), setting[3]
    law = row_law(logits, knobs, top_k)
    target = row_probs(logits, knobs, *law)
    assert (target == 0).sum() > 2 or top_k == 0
    noise = torch.rand(1 + vocab, vocab, generator=generator).to(device)
    proposal = logits.float().clamp(min=-3) + 2 * noise
    neutral = torch.tensor([1.0, 1.0, 0.0], device=device)
    seed = torch.arange(N_DRAWS, device=device)
    position, one, root = seed % 5 + 3, torch.ones_like(seed), torch.zeros_like(seed)

    ids_1, support_1 = top_support(proposal[:1].expand(N_DRAWS, -1), neutral, 0, support_size)
    first = ids_1.gather(1, draw(support_1, seed, position, one, DRAFT)[:, None])[:, 0]
    ids_2, support_2 = top_support(proposal[1:][first], neutral, 0, support_size)
    second = ids_2.gather(1, draw(support_2, seed, position + 1, 2 * one, DRAFT)[:, None])[:, 0]
    rows = torch.stack([root, 1 + first, 1 + second], 1).flatten()
    n_drafted = seed % 3  # 0, 1 and 2 of the two places
    n_accepted, bonus = verify_chain(
        logits[rows], knobs, *(x[rows] for x in law), torch.stack([first, second], 1), n_drafted,
        torch.stack([ids_1, ids_2], 1), torch.stack([support_1, support_2], 1), seed, position,
    )  # fmt: skip
    assert (n_accepted <= n_drafted).all()
    assert set(n_accepted.tolist()) == {0, 1, 2}

    x = torch.where(n_accepted >= 1, first, bonus)
    y_left = draw(target[1:][x], seed, position + 1, one, DRAFT + 17)  # the next step, had it been run
    y = torch.where(n_accepted >= 2, second, torch.where(n_accepted == 1, bonus, y_left))
    for n in range(3):
        own = n_drafted == n
        counts = (x * vocab + y)[own].bincount(minlength=vocab**2).cpu()
        assert p_value(counts, (target[0][:, None] * target[1:]).flatten().cpu()) > P_VALUE


@in_bulk
def test_a_draft_law_of_nan_costs_the_draft_and_nothing_else(device: torch.device) -> None:
    key = torch.arange(4000)
    law = torch.tensor([0.2, 0.0, 0.8])
    arguments = [
        *law_rows(law.expand(4000, 2, 3)), torch.zeros(4000, 1, dtype=torch.int64), torch.ones(4000, dtype=torch.int64),
        torch.arange(3).expand(4000, 1, 3), torch.full((4000, 1, 3), math.nan), key, key,
    ]  # fmt: skip
    n_accepted, bonus = verify_chain(*on(device, arguments))
    assert (n_accepted == 0).all()
    assert p_value(bonus.bincount(minlength=3).cpu(), law) > P_VALUE


@in_bulk
def test_frequencies_over_several_blocks(device: torch.device) -> None:
    """Twelve tokens in four blocks, more than half of them drafted: what is emitted follows the target's law."""
    vocab, n_rows = 13_000, 2000
    places = torch.tensor([3, 4, 4000, 4095, 4096, 4097, 8000, 8191, 8192, 12_287, 12_288, 12_999])
    generator = torch.Generator().manual_seed(0)
    logits = torch.full((1, vocab), -9.0)
    logits[0, places] = torch.rand(12, generator=generator) * 2
    knobs = torch.tensor([1.3, 1.0, 0.0], device=device)
    law = row_law(logits.to(device), knobs, 12)
    target = row_probs(logits.to(device), knobs, *law)[0].cpu()
    assert set(target.nonzero()[:, 0].tolist()) == set(places.tolist())
    ids = places[torch.randperm(12, generator=generator)[:7]].to(device)
    support = torch.rand(7, generator=generator).to(device) + 0.1
    support /= support.sum()
    counts, n_rejected = torch.zeros(vocab, dtype=torch.int64), 0
    for start in range(0, 3 * n_rows, n_rows):
        seed = torch.arange(start, start + n_rows, device=device)
        node = torch.ones_like(seed)
        draft = ids[draw(support.expand(n_rows, -1), seed, node * 5, node, DRAFT)]
        n_accepted, bonus = verify_chain(
            logits.to(device).expand(2 * n_rows, -1), knobs, *(x.expand(2 * n_rows) for x in law), draft[:, None],
            node, ids.expand(n_rows, 1, -1), support.expand(n_rows, 1, -1), seed, node * 5,
        )  # fmt: skip
        counts += torch.where(n_accepted > 0, draft, bonus).bincount(minlength=vocab).cpu()
        n_rejected += int((n_accepted == 0).sum())
    assert n_rejected > 500
    assert p_value(counts, target) > P_VALUE


def test_what_the_law_cuts_is_never_emitted(device: torch.device) -> None:
    """Drafts from a law that is not cut, against one that is: at all places, accepted or not."""
    n_cut = 0
    for seed, vocab in enumerate((60, 5000)):
        arguments = chain_case(8, 3, vocab, 14, seed=seed, spread=0.5)
        arguments[0] = arguments[0].round()  # the cut falls among equals
        arguments[1] = torch.tensor([1.0, 0.8, 0.0])
        arguments[2:5] = row_law_reference(*arguments[:2], 7)
        target = row_probs(arguments[0], *arguments[1:5]).view(8, 4, vocab)
        n_accepted, bonus = check_decisions(arguments, device)
        n_cut += int((target[:, :3].gather(2, arguments[5][..., None]) == 0).sum())
        for b in range(8):
            n = int(n_accepted[b])
            emitted = [*arguments[5][b, :n].tolist(), int(bonus[b])]
            assert all(target[b, place, token] > 0 for place, token in enumerate(emitted))
    assert n_cut > 10
