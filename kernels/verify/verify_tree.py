"""Which path of a drafted tree the target accepts, by a rule whose output law is exactly the target's.

Every child of a node has a weight (see `specdec.kernels.verify.tree_rules`): with this probability its subtree must
accept once its earlier siblings' have failed. There are two ways to see to it.

Node by node (rrs, rrsw, spechub, target): a child is accepted with its weight, there and then, and is worth 1 from then
on. Where no child is accepted the path ends.

As a sequence (block, traversal, seqhub): weights are handed down before anything is decided. A leaf of weight w accepts
with probability w. An inner node runs the subtrees of its children until one accepts; failing that it ends the path
itself with its exit weight, or else fails in turn. The root always ends it. More tokens are accepted on average, since
what one token lacks another further down may have to spare.

Either way a node decides once at most, by one number of noise. Decided is where the path ends and from what law the
bonus token comes; drawing it is left to `specdec.kernels.sampling.draw_row`, the one kernel that reads a whole row.

Letters: B samples, T rows, N nodes, M inner nodes, C support size, P = depth + 1 nodes of the longest path.
Source: see `specdec.kernels.verify.tree_rules`; the post-order walk is that of Weng et al., arXiv 2505.12398.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from specdec.kernels.cpu import bind
from specdec.kernels.library import jit, register, tl, triton
from specdec.kernels.sampling.noise import ACCEPT, uniform_reference, unit_uniform
from specdec.kernels.sampling.row_law import law_at, law_of
from specdec.kernels.verify.tree_rules import weigh_children, weigh_children_reference


def verify_tree_reference(
    logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor, topology: Tensor,
    places: Tensor, n_nodes: Tensor, support_ids: Tensor, support_probs: Tensor, n_hubs: Tensor, seed: Tensor,
    position: Tensor, starts: Tensor, depth: int, sequence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Walk each sample's tree to where its path ends.

    Args:
        logits: [T, V]; row starts[b] + n follows node n of sample b.
        knobs: [3]. log_total, threshold, first: [T]; with the logits the rows' laws, see `row_law`.
        topology: [5, N] int64, see `TokenTree.topology`.
        places: [B, N - 1] int64, each drafted node's place in the support of its parent, -1 for none.
        n_nodes: [B] int64, how many of the N nodes a sample has, the leading ones.
        support_ids, support_probs: [B, M, C] int64 and float32, the draft law after each inner node, which sums to
            one. Ids are distinct among entries of positive probability; the others may hold any of the vocabulary.
        n_hubs: [B, M] int64, how many of an inner node's children are hubs, see `tree_rules`.
        seed: [B] int64. position: [B] int64, position of the root's children in their sample.
        starts: [B + 1] int64. A sample without rows is given some other's, and its result means nothing.
        depth: of the tree. sequence: whether weights are handed down.

    Returns:
        path [B, P] int64, the accepted nodes, the root first; past their end it holds the last of them.
        n_accepted [B] int64, drafted nodes on the path. row [B] int64, whose law the bonus token follows, except that
        ids exit_ids [B, C] int64 have the weights exit_weights [B, C] instead of their probabilities; -1 for none.

    Reads its numbers on the host: a definition, which steps run only without a compiler, eagerly and on a CPU.
    """
    parents, depths, first_child, n_children, inner = topology.tolist()
    n_batch, last, size = n_nodes.shape[0], len(logits) - 1, support_ids.shape[-1]
    path = torch.zeros(n_batch, depth + 1, dtype=torch.int64, device="cpu")
    n_accepted, row = (torch.zeros(n_batch, dtype=torch.int64, device="cpu") for _ in range(2))
    exit_ids = torch.full((n_batch, size), -1, dtype=torch.int64, device="cpu")
    exit_weights = torch.zeros(n_batch, size, dtype=torch.promote_types(logits.dtype, torch.float32), device="cpu")

    def accepts(b: int, node: int, probability: Tensor) -> bool:
        key = seed[b], position[b] + depths[node] - 1, torch.tensor(node, dtype=torch.int64, device="cpu")
        return bool(_coin(*key) < probability)

    def ends_at(b: int, node: int, weight: Tensor) -> int:
        """The node below or at this one where the path ends, or -1."""
        children = range(first_child[node], min(first_child[node] + n_children[node], int(n_nodes[b])))
        at, entry = min(int(starts[b]) + node, last), inner[node]
        if not children:
            return node if not sequence or node == 0 or accepts(b, node, weight) else -1
        ids, draft_probs, hubs = support_ids[b, entry], support_probs[b, entry], int(n_hubs[b, entry])
        probs = law_of(logits[at, ids], ids, knobs, log_total[at], threshold[at], first[at])
        outside = (1 - (probs * (draft_probs > 0)).sum()).clamp(min=0)
        own = places[b, children[0] - 1 : children[-1]]
        weights, exit_weight, residual, scale = weigh_children_reference(
            hubs, weight, probs, outside, draft_probs.to(probs.dtype), own
        )
        hubs = max(hubs, 0)
        for child in [*children[hubs:], *children[:hubs]]:
            w = weights[child - children[0]]
            if w > 0 if sequence else accepts(b, child, w):
                end = ends_at(b, child, w if sequence else torch.ones_like(w))
                if end >= 0:
                    return end
        if sequence and node > 0 and not accepts(b, node, exit_weight):
            return -1
        exit_ids[b] = torch.where(draft_probs > 0, ids, -1)
        exit_weights[b] = residual / scale
        return node

    for b in range(n_batch):
        end = node = ends_at(b, 0, exit_weights.new_ones(()))
        n_accepted[b], row[b] = depths[end], min(int(starts[b]) + end, last)
        path[b] = end
        while node >= 0:
            path[b, depths[node]], node = node, parents[node]
    return path, n_accepted, row, exit_ids, exit_weights


def _coin(seed: Tensor, position: Tensor, node: Tensor) -> Tensor:
    return uniform_reference(seed, position, node, ACCEPT)


@cache
def _kernel() -> Callable[..., None] | None:
    floats, ints = "float*", "int64_t*"
    types = [floats] * 4 + [ints] * 5 + [floats] + [ints] * 7 + [ints, floats] + ["int64_t"] * 9
    return bind("verify_tree.cpp", ", ".join(types))


def verify_tree_cpu(
    logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor, topology: Tensor,
    places: Tensor, n_nodes: Tensor, support_ids: Tensor, support_probs: Tensor, n_hubs: Tensor, seed: Tensor,
    position: Tensor, starts: Tensor, depth: int, sequence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Where each sample's path ends, and the law of its bonus token (see `verify_tree_reference`)."""
    inputs = (
        logits, knobs, log_total, threshold, first, topology, places, n_nodes, support_ids, support_probs, n_hubs, seed,
        position, starts,
    )  # fmt: skip
    if (kernel := _kernel()) is None:
        return verify_tree_reference(*inputs, depth, sequence)
    out = _fake(*inputs, depth, sequence)
    arrays = [(x.float() if x.is_floating_point() else x.long()).contiguous() for x in inputs]
    sizes = n_nodes.shape[0], *logits.shape, topology.shape[1], *support_ids.shape[1:], depth + 1
    kernel(*arrays, *out, *sizes, int(sequence), torch.get_num_threads())
    return out


@jit
def _of(block, i, entry):
    """One entry of a block of indices `i`."""
    return tl.sum(tl.where(i == entry, block, 0), 0)


@jit
def _verify_tree_kernel(
    logits_ptr, knobs_ptr, log_total_ptr, threshold_ptr, first_ptr, topology_ptr, places_ptr, n_nodes_ptr, ids_ptr,
    probs_ptr, n_hubs_ptr, seed_ptr, position_ptr, starts_ptr, path_ptr, n_accepted_ptr, row_ptr, exit_ids_ptr,
    exit_weights_ptr, T, N, M, C, P, stride_lt, stride_lv, stride_ib, stride_im, stride_ic, stride_pb, stride_pm,
    stride_pc, SEQUENCE: tl.constexpr, ACCEPT_STREAM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program a sample: its nodes are entries of blocks, and every round of the loop weighs one node's children."""
    i_b = tl.program_id(0).to(tl.int64)
    i_n, i_c, i_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C).to(tl.int64), tl.arange(0, BLOCK_P)
    inverse_temperature, root = tl.load(knobs_ptr), tl.load(starts_ptr + i_b)
    n_nodes = tl.load(n_nodes_ptr + i_b)
    own = i_n < n_nodes
    parent = tl.load(topology_ptr + i_n, mask=own, other=-1).to(tl.int32)
    depth = tl.load(topology_ptr + N + i_n, mask=own, other=0).to(tl.int32)
    first_child = tl.load(topology_ptr + 2 * N + i_n, mask=own, other=N).to(tl.int32)
    is_inner = (first_child < n_nodes).to(tl.int32)
    place = tl.load(places_ptr + i_b * (N - 1) + i_n - 1, mask=own & (i_n > 0), other=-1).to(tl.int32)
    # A node decides once at most, so all coins can be tossed at once.
    coin = unit_uniform(tl.load(seed_ptr + i_b), tl.load(position_ptr + i_b) + depth - 1, i_n, ACCEPT_STREAM)

    weights = tl.full([BLOCK_N], 1.0, tl.float32)  # with which a node's subtree must accept
    fails = tl.zeros([BLOCK_N], tl.int32)  # whether it does not once all its children's have failed
    NEVER: tl.constexpr = 2 * BLOCK_N
    turns = tl.full([BLOCK_N], NEVER, tl.int32)  # of siblings' subtrees the lowest is next; NEVER: none, or over
    ids, residual, scale = tl.full([BLOCK_C], -1, tl.int64), tl.zeros([BLOCK_C], tl.float32), 1.0
    node = _of(is_inner, i_n, 0) - 1  # to be weighed next, -1 for none
    end = -1 - node  # of the path, -1 while it is sought
    while node >= 0:
        entry, row = tl.load(topology_ptr + 4 * N + node), tl.minimum(root + node, T - 1)
        o_ids, o_probs = i_b * stride_ib + entry * stride_im, i_b * stride_pb + entry * stride_pm
        draft_probs = tl.load(probs_ptr + o_probs + i_c * stride_pc, mask=i_c < C, other=0).to(tl.float32)
        listed = draft_probs > 0
        ids = tl.load(ids_ptr + o_ids + i_c * stride_ic, mask=listed, other=-1)
        logit = tl.load(logits_ptr + row * stride_lt + ids * stride_lv, mask=listed, other=-float("inf"))
        log_total, threshold = tl.load(log_total_ptr + row), tl.load(threshold_ptr + row)
        probs = law_at(logit.to(tl.float32), ids, inverse_temperature, log_total, threshold, tl.load(first_ptr + row))
        outside = 1 - tl.sum(probs, 0)
        outside = tl.where(outside < 0, 0.0, outside)
        n_hubs, is_child = tl.load(n_hubs_ptr + i_b * M + entry), parent == node
        first, last = _of(first_child, i_n, node), tl.max(tl.where(is_child, i_n, 0), 0)
        below, exit_weight, residual, scale = weigh_children(
            n_hubs, _of(weights, i_n, node), probs, outside, draft_probs, place, first, last + 1
        )
        if end >= 0:  # the path ends here, and others have been weighed since this one was
            node = -1
        else:
            goes = coin < below
            if SEQUENCE:
                goes = tl.where(is_inner > 0, below > 0, goes)
                weights = tl.where(is_child, below, weights)
                fails = tl.where((i_n == node) & (i_n > 0) & ((coin < exit_weight) == 0), 1, fails)
            turn = tl.where(i_n < first + n_hubs, i_n + BLOCK_N, i_n)  # hubs come last
            turns = tl.where(is_child & goes, turn.to(tl.int32), turns)
            at = node
            turn, child = tl.min(tl.where(parent == at, turns, NEVER), 0, return_indices=True)
            while (turn == NEVER) & (_of(fails, i_n, at) > 0):
                at = _of(parent, i_n, at)
                turn, child = tl.min(tl.where(parent == at, turns, NEVER), 0, return_indices=True)
            turns = tl.where(i_n == child, NEVER, turns)
            at = tl.where(turn < NEVER, child, at)
            inner_at = _of(is_inner, i_n, at) > 0
            end = tl.where((turn < NEVER) & inner_at, -1, at)
            node = tl.where(inner_at & (at != node), at, -1)

    n_accepted, has_law = _of(depth, i_n, end), _of(is_inner, i_n, end) > 0
    tl.store(n_accepted_ptr + i_b, n_accepted.to(tl.int64))
    tl.store(row_ptr + i_b, tl.minimum(root + end, T - 1))
    tl.store(exit_ids_ptr + i_b * C + i_c, tl.where(has_law, ids, -1), mask=i_c < C)
    tl.store(exit_weights_ptr + i_b * C + i_c, tl.where(has_law, residual / scale, 0.0), mask=i_c < C)
    tl.store(path_ptr + i_b * P + i_p, end.to(tl.int64), mask=(i_p >= n_accepted) & (i_p < P))
    while n_accepted > 0:
        n_accepted, end = n_accepted - 1, _of(parent, i_n, end)
        tl.store(path_ptr + i_b * P + n_accepted, end.to(tl.int64))


def verify_tree_triton(
    logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor, topology: Tensor,
    places: Tensor, n_nodes: Tensor, support_ids: Tensor, support_probs: Tensor, n_hubs: Tensor, seed: Tensor,
    position: Tensor, starts: Tensor, depth: int, sequence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Where each sample's path ends, and the law of its bonus token (see `verify_tree_reference`)."""
    out = _fake(
        logits, knobs, log_total, threshold, first, topology, places, n_nodes, support_ids, support_probs, n_hubs, seed,
        position, starts, depth, sequence,
    )  # fmt: skip
    n_batch, n_entries, size = support_ids.shape
    n_all = topology.shape[1]
    block_n, block_c, block_p = (triton.next_power_of_2(n) for n in (n_all, size, depth + 1))
    if n_batch > 0:
        _verify_tree_kernel[(n_batch,)](
            logits, *(x.contiguous() for x in (knobs, log_total, threshold, first, topology, places, n_nodes)),
            support_ids, support_probs, *(x.contiguous() for x in (n_hubs, seed, position, starts)), *out, len(logits),
            n_all, n_entries, size, depth + 1, *logits.stride(), *support_ids.stride(), *support_probs.stride(),
            SEQUENCE=sequence, ACCEPT_STREAM=ACCEPT, BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_P=block_p,
            # Few warps: most of what there is to do are sums over blocks, and one warp's need no shared memory. It may
            # have all registers; left to itself ptxas may spill at 128.
            num_warps=max(block_n // 256, block_c // 256, 1), maxnreg=255,
        )  # fmt: skip
    return out


def _fake(
    logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor, topology: Tensor,
    places: Tensor, n_nodes: Tensor, support_ids: Tensor, support_probs: Tensor, n_hubs: Tensor, seed: Tensor,
    position: Tensor, starts: Tensor, depth: int, sequence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n_batch, size = n_nodes.shape[0], support_ids.shape[2]
    shapes = (n_batch, depth + 1), (n_batch,), (n_batch,), (n_batch, size)
    path, n_accepted, row, exit_ids = (torch.empty(s, dtype=torch.int64, device=n_nodes.device) for s in shapes)
    exit_weights = torch.empty((n_batch, size), dtype=torch.float32, device=n_nodes.device)
    return path, n_accepted, row, exit_ids, exit_weights


verify_tree = register(
    "verify_tree(Tensor logits, Tensor knobs, Tensor log_total, Tensor threshold, Tensor first, Tensor topology, "
    "Tensor places, Tensor n_nodes, Tensor support_ids, Tensor support_probs, Tensor n_hubs, Tensor seed, "
    "Tensor position, Tensor starts, int depth, bool sequence) "
    "-> (Tensor path, Tensor n_accepted, Tensor row, Tensor exit_ids, Tensor exit_weights)",
    cpu=verify_tree_cpu,
    launcher=verify_tree_triton,
    fake=_fake,
    kernel=_kernel,
)
