"""What the children of one node of a draft tree must accept, so that the output law stays the target's.

A node of a tree has a weight w: with this probability its subtree must accept, averaged over what is drafted below it.
The target's law p after the node then asks for the mass w p(t) of every next token t. The children, drafted from the
node's draft law q, carry as much of it as they can; what they leave is drawn when all of them have failed.

Drawn children (rules IID and DISTINCT), one after the other, with m = w p, W = w and the child x drawn from q:

    the subtree of x has the weight min(1, m(x) / q(x)), and fails with probability D = r + 1 - W, r = sum (m - q)+
    m <- (m - q)+ / D     W <- r / D     and, drawn without replacement (DISTINCT), q <- q without x, renormalised

With w = 1 this is recursive rejection sampling (RRS, and RRSw without replacement); handing weights down a chain it is
block verification, down a tree traversal verification. A child proposed without randomness (TOP) is a one-hot q.

The hub (HUB, SpecHub and its generalisation): with k children, the k - 1 best of q, A, are drafted always, one more, i,
is drawn from the rest, q' = q without A, renormalised. With S = sum over j not in A of (q'_j - w p_j)+ :

    the subtree of i is first, with the weight min(1, w p_i / q'_i), then b in A with w p_b / (S - w p of those before)
    what is left: (w p_j - q'_j)+ for j not in A, nothing for A; with r its sum, the node ends with r / (r + 1 - w)

This is the best any rule can do with children drafted so. Where q has no mass outside A there is no i, and S = 1.

All sums run over the support of q alone: outside of it m is p times one number, the scale.

Letters: C support size, K children of a node. In code `target_probs` is p, `draft_probs` q, `measure` m, `total` W.
Source: SpecInfer, arXiv 2305.09781 (RRS); Sequoia, arXiv 2402.12374 (RRSw); SpecHub, arXiv 2411.05289; Hu et al., arXiv
2502.18779 (hub of k children); Sun et al., arXiv 2403.10444 (block); Weng et al., arXiv 2505.12398 (traversal).
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.library import jit, tl

IID, DISTINCT, HUB, TOP = range(4)
"""How the children of a node were drafted: drawn with replacement; without; the best and one drawn; the best."""
_DISTINCT, _HUB, _TOP = (rule if tl is None else tl.constexpr(rule) for rule in (DISTINCT, HUB, TOP))


def weigh_children_reference(
    rule: int, weight: Tensor, target_probs: Tensor, outside: Tensor, draft_probs: Tensor, places: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each child's subtree must accept once those tested before it have failed, and what is left after all.

    Tested are the children in order, with HUB the last one first.

    Args:
        rule: IID, DISTINCT, HUB or TOP.
        weight: [...], of the node; 1 for a root.
        target_probs: [..., C], p of the support's ids. outside: [...], p's mass outside of the support.
        draft_probs: [..., C], q; entries of probability zero (or NaN) do not belong to the support.
        places: [..., K] int64, the children's places in the support, -1 for none; for HUB the drawn child is the last.

    Returns:
        weights [..., K]; exit_weight [...]: the probability of ending at this node once all children have failed;
        residual [..., C] and scale [...]: the token is then drawn from residual on the support, scale * p outside.
    """
    listed = draft_probs > 0
    law = torch.where(listed, draft_probs, 0)
    measure = weight[..., None] * torch.where(listed, target_probs, 0)
    weights = torch.zeros_like(places, dtype=measure.dtype)
    place = torch.arange(law.shape[-1], device=law.device)
    is_child = place == places[..., None]  # [..., K, C]
    if rule == HUB:
        is_hub = is_child[..., :-1, :].any(-2)
        rest = torch.where(is_hub, 0, law)
        mass = rest.sum(-1, keepdim=True)
        rest = rest / torch.where(mass > 0, mass, 1)
        carried = torch.where(is_hub, 0, measure)
        weights[..., -1] = _ratio((carried * is_child[..., -1, :]).sum(-1), (rest * is_child[..., -1, :]).sum(-1))
        failed = torch.where(mass[..., 0] > 0, (rest - carried).clamp(min=0).sum(-1), 1)
        for k in range(places.shape[-1] - 1):
            asked = (measure * is_child[..., k, :]).sum(-1)
            weights[..., k] = _ratio(asked, failed)
            failed = failed - asked
        residual = (carried - rest).clamp(min=0)
        left = residual.sum(-1) + weight * outside
        return weights, _share(left, left + (1 - weight)), residual, weight
    scale, total = weight, weight
    for k in range(places.shape[-1]):
        chosen = is_child[..., k, :]
        proposal = chosen.to(law.dtype) if rule == TOP else law
        weights[..., k] = _ratio((measure * chosen).sum(-1), (proposal * chosen).sum(-1))
        left = (measure - proposal).clamp(min=0)
        mass = left.sum(-1) + scale * outside
        failed = mass + (1 - total)
        goes_on = chosen.any(-1) & (failed > 0)
        measure = torch.where(goes_on[..., None], left / failed[..., None], measure)
        scale, total = torch.where(goes_on, scale / failed, scale), torch.where(goes_on, mass / failed, total)
        if rule == DISTINCT:
            law = torch.where(chosen, 0, law)
            mass = law.sum(-1, keepdim=True)
            law = law / torch.where(mass > 0, mass, 1)
    return weights, total, measure, scale


def _ratio(asked: Tensor, proposed: Tensor) -> Tensor:
    """min(1, asked / proposed); 0 where nothing is asked or nothing was proposed."""
    return torch.where((asked > 0) & (proposed > 0), (asked / proposed).clamp(max=1), 0)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; 1 where there is no whole: a node that never fails."""
    return torch.where(whole > 0, part / whole, 1)


@jit
def _positive(x):
    """max(x, 0), of a NaN a NaN."""
    return tl.where(x < 0, 0.0, x)


@jit
def _weight(asked, proposed):
    """As `_ratio`, of scalars or blocks."""
    is_any = (asked > 0) & (proposed > 0)
    return tl.where(is_any, tl.minimum(asked / tl.where(is_any, proposed, 1.0), 1.0), 0.0)


@jit
def _renormalised(law):
    """The law, and its mass before."""
    mass = tl.sum(law, 0)
    return law / tl.where(mass > 0, mass, 1.0), mass


@jit
def weigh_children(rule, weight, target_probs, outside, draft_probs, places, begin, end):
    """As `weigh_children_reference` for one node: blocks [BLOCK_C] and [BLOCK_K], scalars else.

    The children are the entries `begin` to `end` - 1 of `places`; the weights of others are 0.
    """
    i_c, i_k = tl.arange(0, draft_probs.shape[0]), tl.arange(0, places.shape[0])
    law = tl.where(draft_probs > 0, draft_probs, 0.0)
    measure = tl.where(draft_probs > 0, weight * target_probs, 0.0)
    weights = tl.zeros(places.shape, tl.float32)
    scale, total = weight, weight
    k = begin
    if rule == _HUB:
        asked = tl.zeros(places.shape, tl.float32)
        rest, carried = law, measure
        while k < end - 1:
            is_hub = i_c == tl.sum(tl.where(i_k == k, places, 0), 0)
            asked = tl.where(i_k == k, tl.sum(tl.where(is_hub, measure, 0.0), 0), asked)
            rest, carried = tl.where(is_hub, 0.0, rest), tl.where(is_hub, 0.0, carried)
            k += 1
        rest, mass = _renormalised(rest)
        failed = tl.where(mass > 0, tl.sum(_positive(rest - carried), 0), 1.0)
        weights = _weight(asked, failed - (tl.cumsum(asked, 0) - asked))
        is_drawn = i_c == tl.sum(tl.where(i_k == k, places, 0), 0)
        drawn = _weight(tl.sum(tl.where(is_drawn, carried, 0.0), 0), tl.sum(tl.where(is_drawn, rest, 0.0), 0))
        weights = tl.where(i_k == k, drawn, weights)
        measure = _positive(carried - rest)
        left = tl.sum(measure, 0) + weight * outside
        failed = left + (1 - weight)
        total = tl.where(failed > 0, left / failed, 1.0)
    else:
        while k < end:
            place = tl.sum(tl.where(i_k == k, places, 0), 0)
            is_chosen = i_c == place
            proposal = tl.where(rule == _TOP, is_chosen.to(tl.float32), law)
            asked = tl.sum(tl.where(is_chosen, measure, 0.0), 0)
            proposed = tl.sum(tl.where(is_chosen, proposal, 0.0), 0)
            weights = tl.where(i_k == k, _weight(asked, proposed), weights)
            left = _positive(measure - proposal)
            mass = tl.sum(left, 0) + scale * outside
            failed = mass + (1 - total)
            if (place >= 0) & (failed > 0):
                measure, scale, total = left / failed, scale / failed, mass / failed
            if rule == _DISTINCT:
                law, _ = _renormalised(tl.where(is_chosen, 0.0, law))
            k += 1
    return weights, total, measure, scale


WEIGH_CPP = r"""
enum { IID, DISTINCT, HUB, TOP };

static inline float ratio(float asked, float proposed) {
  return asked > 0 && proposed > 0 ? std::min(asked / proposed, 1.0f) : 0;
}

// As `weigh_children_reference` for one node. `measure` holds p of the support, 0 where q is 0, and becomes the
// residual; `law` holds q and is used up.
static void weigh_children(
    int64_t rule, float weight, float outside, const int64_t* places, int64_t K, int64_t C, float* law, float* measure,
    float* weights, float* exit_weight, float* scale) {
  for (int64_t c = 0; c < C; c++) measure[c] *= weight;
  *scale = weight;
  if (rule == HUB) {
    float failed = 0, rest = 0, left = 0;
    for (int64_t k = 0; k + 1 < K; k++) {  // asked of the hubs; they are no part of the rest
      weights[k] = places[k] < 0 ? 0 : measure[places[k]];
      if (places[k] >= 0) law[places[k]] = measure[places[k]] = 0;
    }
    for (int64_t c = 0; c < C; c++) rest += law[c];
    for (int64_t c = 0; rest > 0 && c < C; c++) {
      law[c] /= rest;
      failed += std::max(law[c] - measure[c], 0.0f);
    }
    if (!(rest > 0)) failed = 1;
    const int64_t drawn = places[K - 1];
    weights[K - 1] = drawn < 0 ? 0 : ratio(measure[drawn], law[drawn]);
    for (int64_t k = 0; k + 1 < K; k++) {
      const float asked = weights[k];
      weights[k] = ratio(asked, failed);
      failed -= asked;
    }
    for (int64_t c = 0; c < C; c++) left += measure[c] = std::max(measure[c] - law[c], 0.0f);
    left += weight * outside;
    *exit_weight = left + (1 - weight) > 0 ? left / (left + (1 - weight)) : 1;
    return;
  }
  float total = weight;
  for (int64_t k = 0; k < K; k++) {
    const int64_t x = places[k];
    weights[k] = x < 0 ? 0 : ratio(measure[x], rule == TOP ? 1 : law[x]);
    if (x < 0) continue;
    float left = *scale * outside;
    for (int64_t c = 0; c < C; c++) left += std::max(measure[c] - (rule == TOP ? float(c == x) : law[c]), 0.0f);
    const float failed = left + (1 - total);
    if (failed > 0) {
      for (int64_t c = 0; c < C; c++)
        measure[c] = std::max(measure[c] - (rule == TOP ? float(c == x) : law[c]), 0.0f) / failed;
      *scale /= failed;
      total = left / failed;
    }
    if (rule == DISTINCT) {
      float rest = 0;
      law[x] = 0;
      for (int64_t c = 0; c < C; c++) rest += law[c];
      for (int64_t c = 0; rest > 0 && c < C; c++) law[c] /= rest;
    }
  }
  *exit_weight = total;
}
"""
