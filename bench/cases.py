"""What the micro-benchmarks run: every op at decoding shapes, beside its reference and PyTorch as one would write it.

Letters: B samples, N nodes a tree, T = B * N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import product_cases, tree_cases
from bench.cache_cases import append, attention, commit, masked
from bench.case import Case, Ways
from specdec.kernels.attention.tree_mask import ancestor_words, ancestor_words_reference
from specdec.kernels.linear.skinny_linear import skinny_linear, skinny_linear_reference
from specdec.kernels.sampling.best_token import best_token, best_token_reference
from specdec.kernels.sampling.draw import draw, draw_reference
from specdec.kernels.sampling.row_law import row_law, row_law_reference
from specdec.kernels.sampling.top_support import top_support, top_support_reference
from specdec.zoo import SIZES

CHAIN, TREE, WIDE_TREE = (1,) * 5, (3, 2, 1), (7, 2, 1, 1, 1)
"""Trees of 6, 16 and 64 nodes (see `TokenTree.from_widths`)."""


def _linear(size: str, rows: int) -> Case:
    n_in, n_out = SIZES[size]["hidden_size"], SIZES[size]["intermediate_size"]

    def ways(device: torch.device) -> Ways:
        args = torch.randn(rows, n_in, device=device), torch.randn(n_out, n_in, device=device)
        return {
            "op": partial(skinny_linear, *args),
            "reference": partial(skinny_linear_reference, *args),
            "pytorch": partial(F.linear, *args),
        }

    return Case("skinny_linear", f"{size} {rows} rows", ways, 4 * (n_in * n_out), 2 * rows * n_in * n_out)


def _logits(rows: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, vocabulary, device=device).mul(3).to(dtype)


def _best_token(rows: int, vocabulary: int, dtype: torch.dtype) -> Case:
    def ways(device: torch.device) -> Ways:
        logits = _logits(rows, vocabulary, device, dtype)
        reference = partial(best_token_reference, logits)
        return {"op": partial(best_token, logits), "reference": reference, "pytorch": reference}

    return Case("best_token", f"T {rows} V {vocabulary}", ways, rows * vocabulary * dtype.itemsize)


def _sorted_support(logits: Tensor, knobs: Tensor, top_k: int, size: int) -> tuple[Tensor, Tensor]:
    """Top-k and top-p by sorting, as usually written."""
    top, ids = logits.float().mul(knobs[0]).softmax(-1).sort(-1, descending=True)
    top = torch.where(top.cumsum(-1) - top < knobs[1], top, 0.0)
    return ids[:, :size], top[:, :size] / top[:, :size].sum(-1, keepdim=True)


def _top_support(rows: int, vocabulary: int, dtype: torch.dtype) -> Case:
    def ways(device: torch.device) -> Ways:
        args = _logits(rows, vocabulary, device, dtype), torch.tensor([1.4, 0.9, 0.0], device=device), 0, 64
        return {
            "op": partial(top_support, *args),
            "reference": partial(top_support_reference, *args),
            "pytorch": partial(_sorted_support, *args),
        }

    return Case("top_support", f"R {rows} V {vocabulary}", ways, rows * vocabulary * dtype.itemsize)


def _sorted_law(logits: Tensor, knobs: Tensor, top_k: int) -> Tensor:
    """The dense law by temperature, top-k and a sort, as transformers computes it."""
    scores = logits.float() * knobs[0]
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k)[0][..., -1:], -torch.inf)
    ordered, ids = scores.sort(-1)
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - knobs[1]
    drop[..., -1:] = False
    return scores.masked_fill(drop.scatter(1, ids, drop), -torch.inf).softmax(-1)


def _dense_law(logits: Tensor, knobs: Tensor, top_k: int) -> Tensor:
    return (logits.float() * knobs[0]).softmax(-1)


def _row_law(rows: int, vocabulary: int, dtype: torch.dtype, top_k: int = 0, top_p: float = 1.0) -> Case:
    def ways(device: torch.device) -> Ways:
        args = _logits(rows, vocabulary, device, dtype), torch.tensor([1.4, top_p, 0.0], device=device), top_k
        return {
            "op": partial(row_law, *args),
            "reference": partial(row_law_reference, *args),
            "pytorch": partial(_sorted_law if top_k or top_p < 1 else _dense_law, *args),
        }

    cut = f" top-k {top_k}" * bool(top_k) + f" top-p {top_p}" * (top_p < 1)
    return Case("row_law", f"R {rows} V {vocabulary}{cut}", ways, rows * vocabulary * dtype.itemsize)


def _multinomial(probs: Tensor, *_: object) -> Tensor:
    return torch.multinomial(probs, 1)[:, 0]


def _draw(rows: int, vocabulary: int) -> Case:
    def ways(device: torch.device) -> Ways:
        keys = torch.arange(3 * rows, device=device).view(3, rows)
        args = _logits(rows, vocabulary, device, torch.float32).softmax(-1), *keys, 0
        found: Ways = {"op": partial(draw, *args), "pytorch": partial(_multinomial, *args)}
        return found | ({"reference": partial(draw_reference, *args)} if device.type == "cpu" else {})

    return Case("draw", f"R {rows} V {vocabulary}", ways, rows * vocabulary * 4)


def _closure(parents: Tensor) -> Tensor:
    reach = F.one_hot(parents.clamp(min=0), parents.shape[1]).bool() & (parents >= 0)[..., None]
    reach = reach | torch.eye(parents.shape[1], dtype=torch.bool, device=parents.device)
    for _ in range(parents.shape[1].bit_length()):
        reach = reach | (reach.float() @ reach.float() > 0)
    return reach


def _ancestor_words(batch: int, n_nodes: int) -> Case:
    def ways(device: torch.device) -> Ways:
        parents = (torch.arange(n_nodes, device=device) - 1).div(2, rounding_mode="floor").expand(batch, -1)
        args = (parents.contiguous(),)
        return {
            "op": partial(ancestor_words, *args),
            "reference": partial(ancestor_words_reference, *args),
            "pytorch": partial(_closure, *args),
        }

    return Case("ancestor_words", f"B {batch} N {n_nodes}", ways, 8 * batch * n_nodes * (1 + (n_nodes + 63) // 64))


def cpu_cases() -> Iterator[Case]:
    """Shapes of the models this machine decodes: float32, a few samples, hundreds of tokens."""
    f32 = torch.float32
    for size in ("25m", "100m", "300m"):
        for rows in (3, 6, 16):
            yield _linear(size, rows)
        for batch in (1, 4):
            yield attention("ragged_attention", size, batch, 6, 512, f32)
        for n_queries in (1, 8):
            yield masked(size, 1, n_queries, 4096, f32)
    for size in ("25m", "300m"):
        yield append(size, 4, 6, 512, f32)
        yield commit(size, 4, 4, 512, f32)
    for vocabulary in (4096, 128256):
        yield _top_support(4, vocabulary, f32)
        yield _row_law(4, vocabulary, f32)
        yield _row_law(4, vocabulary, f32, 50, 0.9)
        yield _draw(4, vocabulary)
        yield tree_cases.verify(4, CHAIN, vocabulary, f32)
    yield _draw(4, 64)
    for vocabulary in (32000, 128256):
        yield tree_cases.draw_of_logits(1, TREE, vocabulary, f32)
    yield tree_cases.draw(8, WIDE_TREE)
    for batch, widths, vocabulary in ((1, TREE, 32000), (8, TREE, 32000), (1, WIDE_TREE, 128256)):
        yield tree_cases.verify(batch, widths, vocabulary, f32)
    yield tree_cases.verify(1, TREE, 128256, f32, of_logits=True)
    for batch, widths in ((1, CHAIN), (8, TREE), (64, WIDE_TREE)):
        yield tree_cases.greedy(batch, widths)
    for n_nodes in (8, 64):
        yield _ancestor_words(4, n_nodes)


def gpu_cases() -> Iterator[Case]:
    """Llama-3.1-8B shapes in bfloat16, what a step spends most time in first. Caches well below the L2's size are there
    to be seen, not to be judged."""
    bf16, vocabulary = torch.bfloat16, SIZES["8b"]["vocab_size"]
    for rows in (1, 6, 16, 48, 192):
        yield product_cases.gated("8b", rows)
        yield product_cases.joined("8b", rows)
        for layer in ("down", "out", "head"):
            yield product_cases.library("8b", layer, rows)
    for batch, n_nodes, n_slots in ((1, 16, 2048), (1, 1, 8192), (8, 16, 2048), (32, 16, 2048)):
        yield attention("ragged_attention", "8b", batch, n_nodes, n_slots, bf16)
    for rows in (1, 6, 48, 192):
        yield _best_token(rows, vocabulary, bf16)
    for rows in (6, 16, 256, 512):
        yield _row_law(rows, vocabulary, bf16)
        yield _row_law(rows, vocabulary, bf16, 50, 0.9)
    for batch, n_slots in ((1, 8192), (32, 8192), (8, 32768), (1, 131072)):
        yield attention("ragged_attention", "8b", batch, 16, n_slots, bf16)
    for batch in (8, 32):
        yield attention("ragged_attention", "8b", batch, 1, 8192, bf16)
    yield attention("tree_attention", "8b", 32, 16, 8192, bf16)
    for batch, n_queries in ((1, 1), (8, 1), (32, 1), (1, 8), (8, 8)):
        yield masked("8b", batch, n_queries, 4096, bf16)
    for batch in (1, 32, 64):
        yield append("8b", batch, 16, 1024, bf16)
    for batch in (1, 8, 32):
        yield commit("8b", batch, 6, 512, bf16)
    for rows in (1, 16, 256):
        yield _top_support(rows, vocabulary, bf16)
    for rows in (1, 32, 256, 512):
        yield _draw(rows, vocabulary)
    for batch in (1, 32, 256):
        yield tree_cases.verify(batch, CHAIN, vocabulary, bf16)
    for batch, widths in product((1, 8, 64), (TREE, WIDE_TREE)):
        yield tree_cases.draw(batch, widths)
        yield tree_cases.greedy(batch, widths)
        for size in (32000, vocabulary):
            yield tree_cases.draw_of_logits(batch, widths, size, bf16)
            yield tree_cases.verify(batch, widths, size, bf16)
        yield tree_cases.verify(batch, widths, vocabulary, bf16, of_logits=True)
    yield _ancestor_words(32, 64)
