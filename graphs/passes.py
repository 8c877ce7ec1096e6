"""Rewrites of Dynamo's graphs of torch calls: what plain PyTorch does badly while decoding.

A pass takes an `fx.Graph` and returns how many places it replaced; it logs why it left a candidate alone. Sizes are
read from the example values Dynamo leaves on the nodes, and only sizes that Dynamo has made constants decide: a pass
adds no guard.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from specdec.kernels.cpu import has_compiler
from specdec.kernels.library import runs_triton
from specdec.kernels.masked_attention import MAX_QUERIES
from specdec.kernels.skinny_linear import MAX_ROWS, MIN_WEIGHTS

log = logging.getLogger("specdec")


def attention_over_a_padded_cache(graph: fx.Graph) -> int:
    """`scaled_dot_product_attention` of few queries under a mask: read only the keys that the mask lets through.

    Keys and values that were repeated for every query head (`repeat_kv`) are taken as they were before.
    """
    n_replaced = 0
    for node in graph.find_nodes(op="call_function", target=torch._C._nn.scaled_dot_product_attention):
        given = dict(zip(_SDPA, node.args, strict=False)) | node.kwargs
        if reason := _keeps_sdpa(given):
            log.info("%s stays as it is: %s", node.name, reason)
            continue
        q = given["query"]
        scale = given.get("scale")
        repeated = given["key"], given["value"]
        k, v = (_before_repeat(x) for x in repeated)
        with graph.inserting_before(node):
            new = graph.call_function(
                torch.ops.specdec.masked_attention.default,
                (q, k, v, given["attn_mask"], _value(q).shape[-1] ** -0.5 if scale is None else scale),
            )
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        for node, source in zip(repeated, (k, v), strict=True):
            _forget(node, source)
        n_replaced += 1
    return n_replaced


_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _keeps_sdpa(given: dict[str, Any]) -> str | None:
    """Why a call is not ours to replace."""
    q, k, v, mask = (_value(given[name]) for name in ("query", "key", "value", "attn_mask"))
    if mask is None:
        return "it has no mask, so there is nothing to skip"
    if given.get("dropout_p", 0) or given.get("is_causal", False):
        return "dropout, or causal on top of a mask"
    if any(x.ndim != 4 for x in (q, k, v, mask)) or any(x.dtype != q.dtype for x in (k, v)):
        return "queries, keys, values and mask do not all have four dimensions, or differ in dtype"
    if mask.dtype not in (torch.bool, q.dtype):
        return f"a mask of {mask.dtype} on queries of {q.dtype}"
    if not isinstance(q.shape[2], int) or q.shape[2] > MAX_QUERIES:
        return f"{q.shape[2]} queries, more than {MAX_QUERIES} or not known beforehand"
    if not (runs_triton(q) or (q.is_cpu and q.dtype == torch.float32 and has_compiler())):
        return f"no kernel for {q.dtype} on {q.device.type} here"
    return None


def _before_repeat(node: fx.Node) -> fx.Node:
    """The keys [B, G, S, D] that `repeat_kv` made [B, H, S, D] of, or the node itself."""
    if not _is_call(node, "call_method", "reshape") or not _is_call(node.args[0], "call_method", "expand"):
        return node
    expanded: Any = node.args[0]
    indexed = expanded.args[0]
    if not _is_call(indexed, "call_function", operator.getitem) or indexed.args[1] != _NEW_HEADS:
        return node
    source = indexed.args[0]
    n_batch, n_groups, n_slots, dim = _value(source).shape
    repeats = _value(expanded).shape[2]
    repeated = (n_batch, n_groups, repeats, n_slots, dim), (n_batch, n_groups * repeats, n_slots, dim)
    return source if (_value(expanded).shape, _value(node).shape) == repeated else node


_ALL = slice(None, None, None)
_NEW_HEADS = (_ALL, _ALL, None, _ALL, _ALL)  # x[:, :, None, :, :]


def _forget(node: fx.Node, source: fx.Node) -> None:
    """Remove the chain from `node` back to `source`, as far as nobody uses it.

    (`Graph.eliminate_dead_code` would take in-place methods for pure and remove the writes to the cache.)
    """
    while node is not source and not node.users:
        before: Any = node.args[0]
        node.graph.erase_node(node)
        node = before


def linear_of_few_rows(graph: fx.Graph) -> int:
    """Linear layers of large float32 weights on a CPU: stream the weights once while the rows are few."""
    n_replaced = 0
    for node in graph.find_nodes(op="call_function", target=torch._C._nn.linear):
        x, weight, bias = (*node.args, node.kwargs.get("bias"))[:3]
        if reason := _keeps_linear(_value(x), _value(weight)):
            log.debug("%s stays as it is: %s", node.name, reason)
            continue
        with graph.inserting_before(node):
            new = graph.call_function(torch.ops.specdec.skinny_linear.default, (x, weight))
            if bias is not None:
                new = graph.call_function(operator.add, (new, bias))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        n_replaced += 1
    return n_replaced


def _keeps_linear(x: Tensor, weight: Tensor) -> str | None:
    """Why a call is not ours to replace."""
    n_rows = math.prod(x.shape[:-1])  # `Size.numel` would make a constant of a symbol
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not has_compiler():
        return f"no kernel for {weight.dtype} on {weight.device.type} here"
    if weight.numel() < MIN_WEIGHTS or not weight.is_contiguous():
        return f"a weight {list(weight.shape)}, less than {MIN_WEIGHTS} numbers or not contiguous"
    if isinstance(n_rows, int) and not 2 < n_rows <= MAX_ROWS:
        return f"{n_rows} rows, not 3 to {MAX_ROWS}"
    return None


def _is_call(node: object, op: str, target: object) -> bool:
    return isinstance(node, fx.Node) and node.op == op and node.target == target


def _value(node: Any) -> Any:
    """A node's example value; anything else is its own."""
    return node.meta["example_value"] if isinstance(node, fx.Node) else node


PASSES: dict[str, Callable[[fx.Graph], int]] = {
    "attention_over_a_padded_cache": attention_over_a_padded_cache,
    "linear_of_few_rows": linear_of_few_rows,
}
"""The passes by name, in the order in which they run."""
