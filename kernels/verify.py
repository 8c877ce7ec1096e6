"""Which drafted tokens the target accepts, and the token it adds: chains.

Greedy: a drafted token is accepted while it equals the target's argmax; the first argmax that differs, or the one
after the last draft, is the bonus token.

Chain rejection sampling: with target law p and draft law q at a node, the drafted x is accepted when
u < p(x) / q(x); at the first rejection the bonus token is drawn from norm((p - q)+), after full acceptance from the
target's own law. The output law is exactly p, token by token, whatever q is, provided x was drawn from q.
A deterministic proposal is a one-hot q.

Source: Leviathan et al., arXiv 2211.17192, Algorithm 1; Chen et al., arXiv 2302.01318.
Letters: B samples, K drafted tokens a sample, V vocabulary, C support size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.draw import draw
from specdec.kernels.library import register
from specdec.kernels.noise import ACCEPT, BONUS, uniform


def _leading(accepted: Tensor, n_drafted: Tensor) -> Tensor:
    """Length of the leading run of acceptances within each sample's own number of drafts, [B] int64."""
    own = torch.arange(accepted.shape[1], device=accepted.device) < n_drafted[:, None]
    return (accepted & own).long().cumprod(-1).sum(-1)


def verify_greedy_reference(target_ids: Tensor, drafts: Tensor, n_drafted: Tensor) -> tuple[Tensor, Tensor]:
    """Accept the longest prefix of `drafts` that the target itself would have chosen.

    Args:
        target_ids: [B, K + 1] int64, the target's argmax at the root and after each drafted token.
        drafts: [B, K] int64.
        n_drafted: [B] int64, how many of the K a sample really drafted.

    Returns:
        n_accepted [B] and bonus [B], int64.
    """
    n_accepted = _leading(target_ids[:, :-1] == drafts, n_drafted)
    return n_accepted, target_ids.gather(1, n_accepted[:, None])[:, 0]


def verify_chain_reference(
    target_probs: Tensor,
    drafts: Tensor,
    n_drafted: Tensor,
    support_ids: Tensor,
    support_probs: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """Accept or reject a drafted chain so that the output law is the target's.

    Args:
        target_probs: [B, K + 1, V] float32, the target's law at the root and after each drafted token.
        drafts: [B, K] int64, each drawn from the support law of its place.
        n_drafted: [B] int64, how many of the K a sample really drafted.
        support_ids, support_probs: [B, K, C] int64 and float32, the draft law of each place.
        seed: [B] int64.
        position: [B] int64, position of the first drafted token in its sample.

    Returns:
        n_accepted [B] and bonus [B], int64.
    """
    n_batch, n_places = drafts.shape
    place = torch.arange(n_places + 1, device=drafts.device)
    where = position[:, None] + place
    if n_places == 0:
        n_accepted = torch.zeros_like(n_drafted)
        residual = target_probs[:, 0]
    else:
        target_prob = target_probs[:, :-1].gather(2, drafts[..., None])[..., 0]
        draft_prob = (support_probs * (support_ids == drafts[..., None])).sum(-1)
        keys = torch.broadcast_tensors(seed[:, None], where[:, :-1], place[:-1] + 1)
        u = uniform(*keys, ACCEPT)
        n_accepted = _leading(u * draft_prob < target_prob, n_drafted)
        row = torch.arange(n_batch, device=drafts.device)
        exit_probs = target_probs[row, n_accepted]
        # Only a rejected draft leaves a residual; after the last draft the bonus comes from the target's law itself.
        rejected = (n_accepted < n_drafted)[:, None]
        at = n_accepted.clamp(max=n_places - 1)
        taken = torch.where(rejected, support_probs[row, at], 0.0)
        residual = (exit_probs - torch.zeros_like(exit_probs).scatter_add(1, support_ids[row, at], taken)).clamp(min=0)
        # In exact arithmetic a rejection leaves mass in the residual. Rounding can leave none (p equal to q up to
        # rounding, an event of probability about 1e-7); the target's law is then the residual's limit.
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, exit_probs)
    exit_position = position + n_accepted
    return n_accepted, draw(residual, seed, exit_position, n_accepted + 1, BONUS)


def _greedy_fake(target_ids: Tensor, drafts: Tensor, n_drafted: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(n_drafted), torch.empty_like(n_drafted)


def _chain_fake(
    target_probs: Tensor,
    drafts: Tensor,
    n_drafted: Tensor,
    support_ids: Tensor,
    support_probs: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(n_drafted), torch.empty_like(n_drafted)


verify_greedy = register(
    "verify_greedy(Tensor target_ids, Tensor drafts, Tensor n_drafted) -> (Tensor, Tensor)",
    cpu=verify_greedy_reference,
    triton=None,
    fake=_greedy_fake,
)
verify_chain = register(
    "verify_chain(Tensor target_probs, Tensor drafts, Tensor n_drafted, Tensor support_ids, Tensor support_probs, "
    "Tensor seed, Tensor position) -> (Tensor, Tensor)",
    cpu=verify_chain_reference,
    triton=None,
    fake=_chain_fake,
)
