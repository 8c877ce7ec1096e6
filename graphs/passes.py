"""Rewrites of Dynamo's graphs of torch calls: what plain PyTorch does badly while decoding.

A pass takes an `fx.Graph` and returns how many places it replaced; it logs why it left a candidate alone. Sizes are
read from the example values Dynamo leaves on the nodes, and only sizes that Dynamo has made constants decide: a pass
adds no guard.
"""

from __future__ import annotations

import logging
import math
import operator
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from specdec.kernels.attention.masked_attention import MAX_QUERIES
from specdec.kernels.cpu import has_kernels
from specdec.kernels.library import runs_triton
from specdec.kernels.linear import joined_linear, skinny_linear
from specdec.kernels.linear.skinny_linear import MIN_WEIGHTS

log = logging.getLogger("specdec")


def attention_over_a_padded_cache(graph: fx.Graph) -> int:
    """`scaled_dot_product_attention` of few queries under a mask: read only the keys that the mask lets through.

    Keys and values that were repeated for every query head (`repeat_kv`) are taken as they were before.
    """
    n_replaced = 0
    for node in graph.find_nodes(op="call_function", target=torch._C._nn.scaled_dot_product_attention):
        given = _arguments(node, "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        if reason := _keeps_sdpa(node, given):
            log.info("%s stays as it is: %s", node.name, reason)
            continue
        q, mask, scale = given["query"], given["attn_mask"], given.get("scale")
        repeated = [given["key"], given["value"]]
        sources = [_before_repeat(x, node) for x in repeated]
        if not _same(_value(sources[0]).shape[1], _value(sources[1]).shape[1]):
            sources = repeated
        with graph.inserting_before(node):
            scale = _value(q).shape[-1] ** -0.5 if scale is None else scale
            new = graph.call_function(torch.ops.specdec.masked_attention.default, (q, *sources, mask, scale))
            if not _same(_value(node).stride(1), _value(node).shape[3]):  # heads are not neighbours there
                new = graph.call_method("contiguous", (new,))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        for x, source in dict(zip(repeated, sources, strict=True)).items():
            _forget(x, source)
        n_replaced += 1
    return n_replaced


def _keeps_sdpa(node: fx.Node, given: dict[str, Any]) -> str | None:
    """Why a call is not ours to replace."""
    q, k, v, mask = tensors = [_value(given[name]) for name in ("query", "key", "value", "attn_mask")]
    if mask is None:
        return "it has no mask, so there is nothing to skip"
    if given.get("dropout_p", 0):
        return "dropout"
    if reason := _is_special(node, q, k, v):
        return reason
    if mask.dtype not in (torch.bool, q.dtype) or any(x.ndim != 4 for x in tensors):
        return f"a mask of {mask.dtype} on queries of {q.dtype}, or other than four dimensions"
    if not all(isinstance(n, int) for n in (*q.shape[1:], k.shape[1], v.shape[1], v.shape[3])):
        return "heads, queries or head dim are not known beforehand"
    if q.shape[2] > MAX_QUERIES:
        return f"{q.shape[2]} queries, more than {MAX_QUERIES}"
    if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1] or not all(_same(x.shape[0], q.shape[0]) for x in (k, v)):
        return "queries, keys and values do not have the same batch, or heads that do not fit together"
    if not (runs_triton(q) or has_kernels(q)):
        return f"no kernel for {q.dtype} on {q.device.type} here"
    return None


def linear_of_few_rows(graph: fx.Graph) -> int:
    """Linear layers of large float32 weights on a CPU: stream the weights once while the rows are few."""
    n_replaced = 0
    for node in graph.find_nodes(op="call_function", target=torch._C._nn.linear):
        given = _arguments(node, "input", "weight", "bias")
        x, weight, bias = given["input"], given["weight"], given.get("bias")
        if reason := _keeps_linear(node, _value(x), _value(weight)):
            log.debug("%s stays as it is: %s", node.name, reason)
            continue
        with graph.inserting_before(node):
            new = graph.call_function(torch.ops.specdec.skinny_linear.default, (x, weight))
            if bias is not None:
                new = graph.call_function(operator.add, (new, bias))
        new.meta["example_value"] = _value(node)  # the next linear layer may read it
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        n_replaced += 1
    return n_replaced


def _keeps_linear(node: fx.Node, x: Tensor, weight: Tensor) -> str | None:
    """Why a call is not ours to replace."""
    if reason := _is_special(node, x, weight):
        return reason
    if not has_kernels(weight):
        return f"no kernel for {weight.dtype} on {weight.device.type} here"
    n_weights = math.prod(weight.shape)
    if not isinstance(n_weights, int) or n_weights < MIN_WEIGHTS or weight.ndim != 2 or not weight.is_contiguous():
        return f"a weight {list(weight.shape)}, less than {MIN_WEIGHTS} numbers or not contiguous"
    n_rows = math.prod(x.shape[:-1])  # `Size.numel` would make a constant of a symbol
    if isinstance(n_rows, int) and not skinny_linear.is_few(n_rows):
        return f"{n_rows} rows, more than {skinny_linear.max_rows()}"
    return None


def gated_linear_of_few_rows(graph: fx.Graph) -> int:
    """`silu(linear(x)) * linear(x)` in half precision on a GPU: one launch in place of three."""
    n_replaced = 0
    for silu in graph.find_nodes(op="call_function", target=torch.nn.functional.silu):
        product: Any = next(iter(silu.users), None)
        if len(silu.users) != 1 or not _is_call(product, "call_function", operator.mul):
            continue
        up = next((x for x in product.args if x is not silu), None)
        linears = [silu.args[0], up]
        if not all(_is_call(x, "call_function", torch._C._nn.linear) and len(x.users) == 1 for x in linears):
            continue
        given = [_arguments(x, "input", "weight", "bias") for x in linears]
        x, weights = given[0]["input"], [each["weight"] for each in given]
        reasons = [_keeps_linear_apart(node) for node in linears]
        if given[1]["input"] is not x or any(each.get("bias") is not None for each in given):
            reasons += ["two inputs, or biases"]
        if not all(map(_same, _value(weights[0]).shape, _value(weights[1]).shape)):
            reasons += ["weights of two shapes"]
        if found := next(filter(None, reasons), None) or _written_between([*linears, silu, product]):
            log.debug("%s stays as it is: %s", product.name, found)
            continue
        with graph.inserting_before(product):
            new = graph.call_function(torch.ops.specdec.gated_linear.default, (x, *weights))
        new.meta["example_value"] = _value(product)
        product.replace_all_uses_with(new)
        for node in (product, silu, *linears):
            graph.erase_node(node)
        n_replaced += 1
    return n_replaced


def linears_of_one_input(graph: fx.Graph) -> int:
    """Linear layers of the same few rows in half precision on a GPU: one launch for all of them."""
    groups: dict[tuple[fx.Node, bool], list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=torch._C._nn.linear):
        if reason := _keeps_linear_apart(node):
            log.debug("%s stays as it is: %s", node.name, reason)
            continue
        given = _arguments(node, "input", "weight", "bias")
        groups.setdefault((given["input"], given.get("bias") is not None), []).append(node)
    n_replaced = 0
    for (x, _), nodes in groups.items():
        if len(nodes) == 1 or (reason := _written_between(nodes)):
            log.debug("%s stays as it is: %s", nodes[0].name, "alone" if len(nodes) == 1 else reason)
            continue
        arguments = [_arguments(node, "input", "weight", "bias") for node in nodes]
        weights, biases = ([each[name] for each in arguments if each.get(name)] for name in ("weight", "bias"))
        with graph.inserting_before(nodes[0]):
            new = graph.call_function(torch.ops.specdec.joined_linear.default, (x, weights, biases))
            outs = [graph.call_function(operator.getitem, (new, i)) for i in range(len(nodes))]
        for node, out in zip(nodes, outs, strict=True):
            out.meta["example_value"] = _value(node)
            node.replace_all_uses_with(out)
            graph.erase_node(node)
        n_replaced += len(nodes)
    return n_replaced


def _keeps_linear_apart(node: fx.Node) -> str | None:
    """Why a linear layer is not to be computed beside others of its input."""
    given = _arguments(node, "input", "weight", "bias")
    x, *parameters = (given[name] for name in ("input", "weight", "bias") if given.get(name) is not None)
    values = [_value(parameter) for parameter in parameters]
    if os.environ.get("SPECDEC_JOINED_LINEAR") == "0":
        return "SPECDEC_JOINED_LINEAR=0"
    if reason := _is_special(node, _value(x), *values):
        return reason
    if not runs_triton(_value(x)) or _value(x).dtype not in joined_linear.DTYPES:
        return f"no kernel for {_value(x).dtype} on {_value(x).device.type} here"
    if any(x.op not in ("placeholder", "get_attr") for x in parameters):
        return "a weight that is computed"
    sizes = values[0].shape
    if len(sizes) != 2 or not all(isinstance(n, int) for n in sizes) or not all(v.is_contiguous() for v in values):
        return "a weight of sizes not known beforehand, or not contiguous"
    n_rows = math.prod(_value(x).shape[:-1])
    if isinstance(n_rows, int) and n_rows > joined_linear.MAX_ROWS:
        return f"{n_rows} rows, more than {joined_linear.MAX_ROWS}"
    return None


def _written_between(nodes: list[Any]) -> str | None:
    """Why calls, in any order, can't be made all at once: something may be written between them."""
    left, node = set(nodes), nodes[0].graph._root.next
    while left:
        if node in left:
            left.remove(node)
        elif len(left) < len(nodes) and _may_write(node):
            return f"{node.name} may write to what they read"
        node = node.next
    return None


def _is_special(node: fx.Node, *tensors: Any) -> str | None:
    """Why a call is more than arithmetic on plain tensors of one dtype."""
    if any(type(x) is not FakeTensor for x in (_value(node), *tensors)):
        return "tensors of other classes"
    if _value(node).requires_grad:
        return "it may be differentiated"
    if any(x.dtype != _value(node).dtype for x in tensors):
        return f"its inputs are {[x.dtype for x in tensors]} and its output {_value(node).dtype}"
    return None


def _before_repeat(node: fx.Node, user: fx.Node) -> fx.Node:
    """The keys [B, G, S, D] that `repeat_kv` made [B, H, S, D] of for `user`, or the node itself."""
    if not _is_call(node, "call_method", "reshape") or not _is_call(node.args[0], "call_method", "expand"):
        return node
    expanded: Any = node.args[0]
    indexed = expanded.args[0]
    if not _is_call(indexed, "call_function", operator.getitem) or indexed.args[1] != _NEW_HEADS:
        return node
    source = indexed.args[0]
    n_batch, n_groups, n_slots, dim = _value(source).shape
    repeats = _value(expanded).shape[2]
    repeated = n_batch, n_groups, repeats, n_slots, dim, n_batch, n_groups * repeats, n_slots, dim
    if not all(map(_same, (*_value(expanded).shape, *_value(node).shape), repeated)):
        return node
    between = node
    while between is not user:  # the repeated keys are a copy: what was written into the source since is not in it
        if _may_write(between):
            return node
        between = between.next
    return source


_ALL = slice(None, None, None)
_NEW_HEADS = (_ALL, _ALL, None, _ALL, _ALL)  # x[:, :, None, :, :]
_IN_PLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.imatmul, operator.itruediv,
    operator.ifloordiv, operator.imod, operator.ipow, operator.ilshift, operator.irshift, operator.iand, operator.ior,
    operator.ixor,
}  # fmt: skip


def _may_write(node: fx.Node) -> bool:
    """Whether a call may change a tensor in place: methods, functions and operators that say so, and assignments."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    return name.endswith("_") or node.target in _IN_PLACE or "out" in node.kwargs or bool(node.kwargs.get("inplace"))


def _forget(node: fx.Node, source: fx.Node) -> None:
    """Remove the chain from `node` back to `source`, as far as nobody uses it.

    (`Graph.eliminate_dead_code` would take in-place methods for pure and remove the writes to the cache.)
    """
    while node is not source and not node.users:
        before: Any = node.args[0]
        node.graph.erase_node(node)
        node = before


def _arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    """A call's arguments by name."""
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _is_call(node: object, op: str, target: object) -> bool:
    return isinstance(node, fx.Node) and node.op == op and node.target == target


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for all that is known; asking adds no guard."""
    return statically_known_true(a == b)


def _value(node: Any) -> Any:
    """A node's example value; anything else is its own."""
    return node.meta["example_value"] if isinstance(node, fx.Node) else node


PASSES: dict[str, Callable[[fx.Graph], int]] = {
    "attention_over_a_padded_cache": attention_over_a_padded_cache,
    "linear_of_few_rows": linear_of_few_rows,
    "gated_linear_of_few_rows": gated_linear_of_few_rows,
    "linears_of_one_input": linears_of_one_input,
}
"""The passes by name, in the order in which they run."""
