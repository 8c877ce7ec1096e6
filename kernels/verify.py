"""Which drafted tokens the target accepts, and the token it adds: chains.

Greedy: a drafted token is accepted while it equals the target's argmax; the first argmax that differs, or the one
after the last draft, is the bonus token.

Chain rejection sampling: with target law p and draft law q at a node, the drafted x is accepted when
u < p(x) / q(x); at the first rejection the bonus token is drawn from norm((p - q)+), after full acceptance from the
target's own law. The output law is exactly p, token by token, whatever q is, provided x was drawn from q.
A deterministic proposal is a one-hot q.

The target's laws stay rows of logits with three numbers each (see `specdec.kernels.row_law`). The kernel gathers the
drafted logits, and reads one whole row a sample: that of the place where the chain ends.

Source: Leviathan et al., arXiv 2211.17192, Algorithm 1; Chen et al., arXiv 2302.01318.
Letters: B samples, T rows, K drafted tokens a sample at most, V vocabulary, C support size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.draw import DRAW_BLOCK, block_score, draw, draw_reference, entry_scores
from specdec.kernels.library import jit, register, tl, triton
from specdec.kernels.noise import ACCEPT, BONUS, uniform, uniform_reference, unit_uniform
from specdec.kernels.row_law import law_at, law_of, row_probs


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
    logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor, drafts: Tensor,
    n_drafted: Tensor, support_ids: Tensor, support_probs: Tensor, seed: Tensor, position: Tensor, starts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Accept or reject a drafted chain so that the output law is the target's.

    Args:
        logits: [T, V]; row starts[b] + j follows the first j drafted tokens of sample b.
        knobs: [3]. log_total, threshold, first: [T]; with the logits the rows' laws, see `row_law`.
        drafts: [B, K] int64, each drawn from the support law of its place.
        n_drafted: [B] int64, how many of the K a sample really drafted.
        support_ids, support_probs: [B, K, C] int64 and float32, the draft law of each place. Ids are distinct among
            entries of positive probability; the others may hold any id of the vocabulary.
        seed: [B] int64.
        position: [B] int64, position of the first drafted token in its sample.
        starts: [B + 1] int64. A sample without rows is given some other's, and its result means nothing.

    Returns:
        n_accepted [B] and bonus [B], int64. Where a law holds a NaN the bonus is some id of the vocabulary.
    """
    n_batch, n_places = drafts.shape
    rows = (starts[:-1, None] + torch.arange(n_places + 1, device=starts.device)).clamp(max=len(logits) - 1)
    target_probs = row_probs(logits, knobs, log_total, threshold, first)[rows]
    draft_probs = torch.zeros_like(target_probs)  # nothing is drafted at the last node
    draft_probs[:, :-1].scatter_add_(2, support_ids, support_probs.to(target_probs.dtype))
    n_accepted, bonus = torch.zeros_like(n_drafted), torch.zeros_like(n_drafted)
    for b in range(n_batch):
        for at in range(int(n_drafted[b]) + 1):
            key = seed[b, None], position[b, None] + at, torch.full_like(seed[b, None], at + 1)
            if at == n_drafted[b]:
                residual = target_probs[b, at]
                break
            draft_prob = (support_probs[b, at] * (support_ids[b, at] == drafts[b, at])).sum()
            if not uniform_reference(*key, ACCEPT) * draft_prob < target_probs[b, at, drafts[b, at]]:
                residual = (target_probs[b, at] - draft_probs[b, at]).clamp(min=0)
                # In exact arithmetic a rejection leaves mass in the residual. Rounding can leave none (p equal to q
                # up to rounding, an event of probability about 1e-7); the target's law is then the residual's limit.
                residual = residual if residual.sum() > 0 else target_probs[b, at]
                break
        n_accepted[b] = at
        bonus[b] = draw_reference(residual[None], *key, BONUS)[0]
    return n_accepted, bonus


def verify_chain_cpu(
    logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor, drafts: Tensor,
    n_drafted: Tensor, support_ids: Tensor, support_probs: Tensor, seed: Tensor, position: Tensor, starts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Accept or reject a drafted chain so that the output law is the target's (see `verify_chain_reference`)."""
    n_places = drafts.shape[1]
    last = len(logits) - 1
    rows = starts[:-1].clamp(max=last)  # the roots'
    if n_places == 0:
        n_accepted = torch.zeros_like(n_drafted)
        residual = row_probs(logits[rows], knobs, log_total[rows], threshold[rows], first[rows])
    else:
        place = torch.arange(n_places, device=drafts.device)
        at = (rows[:, None] + place).clamp(max=last)
        target_prob = law_of(logits[at, drafts], drafts, knobs, log_total[at], threshold[at], first[at])
        draft_prob = (support_probs * (support_ids == drafts[..., None])).sum(-1)
        keys = torch.broadcast_tensors(seed[:, None], position[:, None] + place, place + 1)
        u = uniform(*keys, ACCEPT)
        n_accepted = _leading(u * draft_prob < target_prob, n_drafted)
        rows = rows + n_accepted
        exit_probs = row_probs(logits[rows], knobs, log_total[rows], threshold[rows], first[rows])
        # Only a rejected draft leaves a residual; after the last draft the bonus comes from the target's law itself.
        rejected = (n_accepted < n_drafted)[:, None]
        left = n_accepted.clamp(max=n_places - 1)[:, None, None].expand(-1, 1, support_ids.shape[-1])
        taken = torch.where(rejected, support_probs.gather(1, left)[:, 0], 0.0).to(exit_probs.dtype)
        draft_probs = torch.zeros_like(exit_probs).scatter_add(1, support_ids.gather(1, left)[:, 0], taken)
        residual = (exit_probs - draft_probs).clamp(min=0)
        # Rounding can leave no mass: see the reference.
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, exit_probs)
    return n_accepted, draw(residual, seed, position + n_accepted, n_accepted + 1, BONUS)


@jit
def _verify_greedy_kernel(
    target_ptr, drafts_ptr, n_drafted_ptr, n_accepted_ptr, bonus_ptr, B, stride_tb, stride_tk, stride_db, stride_dk,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_B samples."""
    i_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    i_k = tl.arange(0, BLOCK_K)[None, :]
    n_drafted = tl.load(n_drafted_ptr + i_b, mask=i_b < B, other=0)
    own = i_k < n_drafted[:, None]
    target = tl.load(target_ptr + i_b[:, None] * stride_tb + i_k * stride_tk, mask=own, other=0)
    draft = tl.load(drafts_ptr + i_b[:, None] * stride_db + i_k * stride_dk, mask=own, other=0)
    n_accepted = tl.min(tl.where(own & (target == draft), BLOCK_K, i_k), 1)
    bonus = tl.load(target_ptr + i_b * stride_tb + n_accepted * stride_tk, mask=i_b < B, other=0)
    tl.store(n_accepted_ptr + i_b, n_accepted.to(tl.int64), mask=i_b < B)
    tl.store(bonus_ptr + i_b, bonus, mask=i_b < B)


def verify_greedy_triton(target_ids: Tensor, drafts: Tensor, n_drafted: Tensor) -> tuple[Tensor, Tensor]:
    """n_accepted [B] and bonus [B] (see `verify_greedy_reference`)."""
    n_batch, n_places = drafts.shape
    n_accepted, bonus = _verify_fake(n_drafted)
    block_k = triton.next_power_of_2(max(n_places, 1))
    block_b = max(1024 // block_k, 1)
    if n_batch > 0:
        _verify_greedy_kernel[(triton.cdiv(n_batch, block_b),)](
            target_ids, drafts, n_drafted.contiguous(), n_accepted, bonus, n_batch, *target_ids.stride(),
            *drafts.stride(), BLOCK_B=block_b, BLOCK_K=block_k,
        )  # fmt: skip
    return n_accepted, bonus


@jit
def _residual(law, i, start, end, ids, probs):
    """(p - q)+ of a block: p `law` [BLOCK] of ids `i` = start ... end - 1, q `probs` of `ids`, both [BLOCK_C]."""
    weights = law
    # Through the support's ids in this block, upwards: every block sums weights of its own, never a difference.
    at = tl.min(tl.where((ids >= start) & (probs > 0), ids, end), 0)
    while at < end:
        left = tl.maximum(law - tl.sum(tl.where(ids == at, probs, 0.0), 0), 0.0)
        weights = tl.where(i == at, left, weights)
        at = tl.min(tl.where((ids > at) & (probs > 0), ids, end), 0)
    return weights


@jit
def _verify_chain_kernel(
    logits_ptr, knobs_ptr, log_total_ptr, threshold_ptr, first_ptr, drafts_ptr, n_drafted_ptr, support_ids_ptr,
    support_probs_ptr, seed_ptr, position_ptr, starts_ptr, n_accepted_ptr, bonus_ptr, T, V, C, stride_lt, stride_lv,
    stride_db, stride_dk, stride_ib, stride_ik, stride_ic, stride_pb, stride_pk, stride_pc, ACCEPT_STREAM: tl.constexpr,
    BONUS_STREAM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program a sample: all its drafts at once, then the row where the chain ends, drawn from in two races."""
    i_b = tl.program_id(0).to(tl.int64)
    seed, position = tl.load(seed_ptr + i_b), tl.load(position_ptr + i_b)
    inverse_temperature = tl.load(knobs_ptr)

    n_drafted = tl.load(n_drafted_ptr + i_b)
    i_k = tl.arange(0, BLOCK_K).to(tl.int64)
    drafted = i_k < n_drafted
    draft = tl.load(drafts_ptr + i_b * stride_db + i_k * stride_dk, mask=drafted, other=0)
    root = tl.minimum(tl.load(starts_ptr + i_b), T - 1)  # a sample without rows stays within bounds
    i_t = root + i_k
    logit = tl.load(logits_ptr + i_t * stride_lt + draft * stride_lv, mask=drafted, other=0).to(tl.float32)
    log_total = tl.load(log_total_ptr + i_t, mask=drafted, other=0)
    threshold = tl.load(threshold_ptr + i_t, mask=drafted, other=0)
    target_prob = law_at(
        logit, draft, inverse_temperature, log_total, threshold, tl.load(first_ptr + i_t, mask=drafted, other=0)
    )
    draft_prob = tl.zeros([BLOCK_K], tl.float32)
    for c in range(0, C, CHUNK_C):
        i_c = (c + tl.arange(0, CHUNK_C)).to(tl.int64)[None, :]
        is_entry = drafted[:, None] & (i_c < C)
        o_ids = i_b * stride_ib + i_k[:, None] * stride_ik + i_c * stride_ic
        o_probs = i_b * stride_pb + i_k[:, None] * stride_pk + i_c * stride_pc
        is_draft = tl.load(support_ids_ptr + o_ids, mask=is_entry, other=-1) == draft[:, None]
        draft_prob += tl.sum(tl.load(support_probs_ptr + o_probs, mask=is_entry, other=0) * is_draft.to(tl.float32), 1)
    u = unit_uniform(seed, position + i_k, i_k + 1, ACCEPT_STREAM)
    accepted = drafted & (u * draft_prob < target_prob)
    n_accepted = tl.min(tl.where(accepted, BLOCK_K, i_k), 0)

    # The draft law where a draft was rejected; after the last draft nothing is taken from the target's law.
    i_c = tl.arange(0, BLOCK_C).to(tl.int64)
    is_entry = i_c < tl.where(n_accepted < n_drafted, C, 0)
    o_ids = i_b * stride_ib + n_accepted * stride_ik + i_c * stride_ic
    o_probs = i_b * stride_pb + n_accepted * stride_pk + i_c * stride_pc
    ids = tl.load(support_ids_ptr + o_ids, mask=is_entry, other=0).to(tl.int32)
    probs = tl.load(support_probs_ptr + o_probs, mask=is_entry, other=0)

    row = root + n_accepted
    p_row = logits_ptr + row * stride_lt
    log_total, threshold = tl.load(log_total_ptr + row), tl.load(threshold_ptr + row)
    first = tl.load(first_ptr + row).to(tl.int32)
    where, node = position + n_accepted, n_accepted + 1
    i = tl.arange(0, BLOCK_V)
    best, winner, best_whole, winner_whole = -1.0, 0, -1.0, 0
    logit = tl.load(p_row + i.to(tl.int64) * stride_lv, mask=i < V, other=-float("inf"))
    for block in range(tl.cdiv(V, BLOCK_V)):
        following = i + BLOCK_V
        o_following = following.to(tl.int64) * stride_lv
        fetched = tl.load(p_row + o_following, mask=following < V, other=-float("inf"))
        law = law_at(logit.to(tl.float32), i, inverse_temperature, log_total, threshold, first)
        # The residual's race, and the whole law's should no mass be left.
        weights = _residual(law, i, block * BLOCK_V, block * BLOCK_V + BLOCK_V, ids, probs)
        score = block_score(tl.sum(weights, 0), seed, where, node, BONUS_STREAM, block)
        winner = tl.where(score > best, block, winner)
        best = tl.maximum(best, score)
        score = block_score(tl.sum(law, 0), seed, where, node, BONUS_STREAM, block)
        winner_whole = tl.where(score > best_whole, block, winner_whole)
        best_whole = tl.maximum(best_whole, score)
        i, logit = following, fetched
    if (best < 0) | (tl.sum((probs != probs).to(tl.int32), 0) > 0):  # rounding left no mass: see the reference
        winner = winner_whole
        probs = tl.zeros_like(probs)

    start = winner * BLOCK_V
    i = start + tl.arange(0, BLOCK_V)
    logit = tl.load(p_row + i.to(tl.int64) * stride_lv, mask=i < V, other=-float("inf")).to(tl.float32)
    law = law_at(logit, i, inverse_temperature, log_total, threshold, first)
    weights = _residual(law, i, start, start + BLOCK_V, ids, probs)
    scores = entry_scores(weights, seed, where, node, BONUS_STREAM, start, BLOCK_V)
    tl.store(bonus_ptr + i_b, (start + tl.argmax(scores, 0)).to(tl.int64))
    tl.store(n_accepted_ptr + i_b, n_accepted)


def verify_chain_triton(
    logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor, drafts: Tensor,
    n_drafted: Tensor, support_ids: Tensor, support_probs: Tensor, seed: Tensor, position: Tensor, starts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """n_accepted [B] and bonus [B] (see `verify_chain_reference`)."""
    n_batch, n_places, size = support_ids.shape
    vocab = logits.shape[-1]
    n_accepted, bonus = _verify_fake(n_drafted)
    block_k, block_c = (triton.next_power_of_2(max(n, 1)) for n in (n_places, size))
    block_v = min(max(triton.next_power_of_2(vocab), 4), DRAW_BLOCK)
    if n_batch > 0:
        _verify_chain_kernel[(n_batch,)](
            logits, *(x.contiguous() for x in (knobs, log_total, threshold, first)), drafts, n_drafted.contiguous(),
            support_ids, support_probs, *(x.contiguous() for x in (seed, position, starts)), n_accepted, bonus,
            len(logits), vocab, size, *logits.stride(), *drafts.stride(), *support_ids.stride(),
            *support_probs.stride(),
            ACCEPT_STREAM=ACCEPT, BONUS_STREAM=BONUS, BLOCK_K=block_k, BLOCK_C=block_c, BLOCK_V=block_v,
            CHUNK_C=min(block_c, max(2048 // block_k, 1)), num_warps=8 if block_v > 1024 else 4,
        )  # fmt: skip
    return n_accepted, bonus


def _verify_fake(n_drafted: Tensor) -> tuple[Tensor, Tensor]:
    n_accepted, bonus = (torch.empty(n_drafted.shape, dtype=torch.int64, device=n_drafted.device) for _ in range(2))
    return n_accepted, bonus


verify_greedy = register(
    "verify_greedy(Tensor target_ids, Tensor drafts, Tensor n_drafted) -> (Tensor, Tensor)",
    cpu=verify_greedy_reference,
    launcher=verify_greedy_triton,
    fake=lambda target_ids, drafts, n_drafted: _verify_fake(n_drafted),
)
verify_chain = register(
    "verify_chain(Tensor logits, Tensor knobs, Tensor log_total, Tensor threshold, Tensor first, Tensor drafts, "
    "Tensor n_drafted, Tensor support_ids, Tensor support_probs, Tensor seed, Tensor position, Tensor starts) "
    "-> (Tensor, Tensor)",
    cpu=verify_chain_cpu,
    launcher=verify_chain_triton,
    fake=lambda *args: _verify_fake(args[6]),
)
