"""What the children of one node of a draft tree must accept, so that the output law stays the target's.

A node of a tree has a weight w: with this probability its subtree must accept, averaged over what is drafted below it.
The target's law p after the node then asks for the mass w p(t) of every next token t. The children, drafted from the
node's draft law q, carry as much of it as they can; what they leave is drawn when all of them have failed.

Of a node's k children the first h are hubs, the best tokens of q, drafted without chance; the others are drawn from the
rest of q, one after the other without replacement. The drawn ones are tested first, then the hubs. Each is a proposal:
a drawn child x from q without the hubs and without those drawn before, renormalised; a hub from the law that is one at
itself. With m = w p and W = w, for each in turn

    the subtree of x has the weight min(1, m(x) / q(x)), and fails with probability D = r + 1 - W, r = sum (m - q)+
    m <- (m - q)+ / D     W <- r / D

and with all of them failed the path ends at the node with probability W, with a token from m.

With w = 1, h = 0 is recursive rejection sampling without replacement (RRSw), h = k - 1 is SpecHub and its
generalisation, the best any rule can do with children drafted so, and h = k needs no draft law at all. Children drawn
with replacement (RRS) are the same with a q that stays. Handing weights down makes block verification of a chain,
traversal verification of an RRSw tree, and a better SpecHub of a hub tree.

How many hubs a node has may depend on its q, but never on what was drawn from it.

All sums run over the support of q alone: outside of it m is p times one number, the scale.

Letters: C support size, K children of a node. In code `target_probs` is p, `draft_probs` q, `measure` m, `total` W.
Source: SpecInfer, arXiv 2305.09781 (RRS); Sequoia, arXiv 2402.12374 (RRSw); SpecHub, arXiv 2411.05289; Hu et al., arXiv
2502.18779 (hub of k children); Sun et al., arXiv 2403.10444 (block); Weng et al., arXiv 2505.12398 (traversal).
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.library import jit, tl

WITH_REPLACEMENT = -1
"""In place of a number of hubs: no hubs, and every child is drawn from all of q."""


def weigh_children_reference(
    n_hubs: int, weight: Tensor, target_probs: Tensor, outside: Tensor, draft_probs: Tensor, places: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each child's subtree must accept once those tested before it have failed, and what is left after all.

    Args:
        n_hubs: so many leading children are hubs (all, if there are fewer), or WITH_REPLACEMENT.
        weight: [...], of the node; 1 for a root.
        target_probs: [..., C], p of the support's ids. outside: [...], p's mass outside of the support.
        draft_probs: [..., C], q, which sums to one; entries of probability zero (or NaN) do not belong to the support.
        places: [..., K] int64, the children's places in the support, -1 for none. The first `n_hubs` are tested last.

    Returns:
        weights [..., K]; exit_weight [...]: the probability of ending at this node once all children have failed;
        residual [..., C] and scale [...]: the token is then drawn from residual on the support, scale * p outside.
    """
    listed = draft_probs > 0
    measure = weight[..., None] * torch.where(listed, target_probs, 0)
    scale, total = weight, weight
    weights = torch.zeros_like(places, dtype=measure.dtype)
    place = torch.arange(listed.shape[-1], device=places.device, dtype=torch.int64)
    is_child = place == places[..., None]  # [..., K, C]
    hubs, n_children = max(n_hubs, 0), places.shape[-1]
    law = torch.where(listed, draft_probs, 0)
    if hubs:
        law = _without(law, is_child[..., :hubs, :].any(-2))
    for k in [*range(hubs, n_children), *range(min(hubs, n_children))]:
        chosen = is_child[..., k, :]
        proposal = chosen.to(law.dtype) if k < hubs else law
        weights[..., k] = _ratio((measure * chosen).sum(-1), (proposal * chosen).sum(-1))
        left = (measure - proposal).clamp(min=0)
        mass = left.sum(-1) + scale * outside
        failed = mass + (1 - total)
        goes_on = chosen.any(-1) & (failed > 0)
        measure = torch.where(goes_on[..., None], left / failed[..., None], measure)
        scale, total = torch.where(goes_on, scale / failed, scale), torch.where(goes_on, mass / failed, total)
        if n_hubs != WITH_REPLACEMENT:
            law = _without(law, chosen)
    return weights, total, measure, scale


def _without(law: Tensor, gone: Tensor) -> Tensor:
    """The law without the entries marked in `gone`, renormalised; zeros if nothing is left."""
    law = torch.where(gone, 0, law)
    mass = law.sum(-1, keepdim=True)
    return law / torch.where(mass > 0, mass, 1)


def _ratio(asked: Tensor, proposed: Tensor) -> Tensor:
    """min(1, asked / proposed); 0 where nothing is asked or nothing was proposed."""
    return torch.where((asked > 0) & (proposed > 0), (asked / proposed).clamp(max=1), 0)


@jit
def _renormalised(law):
    mass = tl.sum(law, 0)
    return law / tl.where(mass > 0, mass, 1.0)


@jit
def weigh_children(n_hubs, weight, target_probs, outside, draft_probs, places, begin, end):
    """As `weigh_children_reference` for one node: blocks [BLOCK_C] and [BLOCK_K], scalars else.

    The children are the entries `begin` to `end` - 1 of `places`; the weights of others are 0.
    """
    i_c, i_k = tl.arange(0, draft_probs.shape[0]), tl.arange(0, places.shape[0])
    law = tl.where(draft_probs > 0, draft_probs, 0.0)
    measure = tl.where(draft_probs > 0, weight * target_probs, 0.0)
    weights = tl.zeros(places.shape, tl.float32)
    scale, total = weight, weight
    first_drawn = tl.minimum(begin + tl.maximum(n_hubs, 0), end).to(tl.int32)
    k = begin
    while k < first_drawn:
        law = tl.where(i_c == tl.sum(tl.where(i_k == k, places, 0), 0), 0.0, law)
        k += 1
    if n_hubs > 0:
        law = _renormalised(law)
    turn = begin
    while turn < end:
        k = first_drawn + turn - begin
        is_hub = k >= end
        k = tl.where(is_hub, k - end + begin, k)
        place = tl.sum(tl.where(i_k == k, places, 0), 0)
        is_chosen = i_c == place
        proposal = tl.where(is_hub, is_chosen.to(tl.float32), law)
        asked = tl.sum(tl.where(is_chosen, measure, 0.0), 0)
        proposed = tl.sum(tl.where(is_chosen, proposal, 0.0), 0)
        is_any = (asked > 0) & (proposed > 0)
        own = tl.where(is_any, tl.minimum(asked / tl.where(is_any, proposed, 1.0), 1.0), 0.0)
        weights = tl.where(i_k == k, own, weights)
        left = measure - proposal
        left = tl.where(left < 0, 0.0, left)  # of a NaN a NaN
        mass = tl.sum(left, 0) + scale * outside
        failed = mass + (1 - total)
        if (place >= 0) & (failed > 0):
            measure, scale, total = left / failed, scale / failed, mass / failed
        if n_hubs >= 0:
            law = _renormalised(tl.where(is_chosen, 0.0, law))
        turn += 1
    return weights, total, measure, scale
