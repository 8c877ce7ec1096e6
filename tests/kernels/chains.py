"""Arguments of `verify_chain` for its tests, and that what runs decides what is defined."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from rows import OFF, Knobs
from torch import Tensor

from specdec.kernels import verify
from specdec.kernels.library import INTERPRETED
from specdec.kernels.row_law import row_law_reference


def on_grid(function: Callable[..., Any]) -> Callable[..., Any]:
    """A chain rule without its last argument: sample b's rows begin at b * (K + 1)."""

    def call(*arguments: Tensor) -> Any:
        n_batch, n_places = arguments[5].shape
        return function(*arguments, torch.arange(n_batch + 1, device=arguments[5].device) * (n_places + 1))

    return call


verify_chain, verify_chain_cpu, verify_chain_reference, verify_chain_triton = map(
    on_grid, (verify.verify_chain, verify.verify_chain_cpu, verify.verify_chain_reference, verify.verify_chain_triton)
)


def law_rows(target_probs: Tensor) -> list[Tensor]:
    """The first five arguments of `verify_chain` for target laws [B, K + 1, V]."""
    n_rows = target_probs.shape[:2].numel()
    none = target_probs.new_full((n_rows,), -math.inf)
    knobs = target_probs.new_tensor([1, 1, 0])
    return [target_probs.log().flatten(0, 1), knobs, torch.zeros_like(none), none, none.new_zeros(n_rows).long()]


def chain_case(
    n_batch: int, n_places: int, vocab: int, size: int, *, seed: int = 0, dtype: torch.dtype = torch.float32,
    setting: Knobs = OFF, spread: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """Arguments of `verify_chain`: random rows, and drafts from a law that differs from theirs by noise of `spread`.

    The support's ids are in no order, some of its entries have probability zero and hold another entry's id.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    *knobs, top_k = setting
    logits = (normal(n_batch * (n_places + 1), vocab) * 2).to(dtype)
    law = row_law_reference(logits, torch.tensor(knobs), top_k)
    logits_after = logits.unflatten(0, (n_batch, n_places + 1))[:, :-1].float()
    proposal = (logits_after + spread * normal(n_batch, n_places, vocab)).softmax(-1)
    support, ids = proposal.topk(min(size, vocab), dim=-1)
    order = torch.randperm(support.shape[-1], generator=generator)
    support, ids = support[..., order], ids[..., order]
    if support.shape[-1] > 2:
        support[..., 1] = 0
        ids[..., 1] = ids[..., 0]
    support = support / support.sum(-1, keepdim=True)
    pick = (support / torch.empty_like(support).exponential_(generator=generator)).argmax(-1, keepdim=True)
    n_drafted = torch.full((n_batch,), n_places)
    if seed % 2:
        n_drafted = torch.randint(n_places + 1, (n_batch,), generator=generator)
    keys = [torch.randint(-(2**62), 2**62, (n_batch,), generator=generator) for _ in "sp"]
    return [
        logits, torch.tensor(knobs), *law, ids.gather(-1, pick)[..., 0], n_drafted, ids, support, keys[0],
        keys[1] % 2**31,
    ]  # fmt: skip


def on(device: torch.device, arguments: list[Tensor]) -> list[Tensor]:
    return [x.to(device) for x in arguments]


def check_decisions(arguments: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The op itself and what runs on a CPU do what is defined."""
    expected = verify_chain_reference(*arguments)
    functions = [verify_chain] if INTERPRETED else [verify_chain, verify_chain_cpu]  # it draws with an op itself
    for function in functions:
        got = function(*on(device, arguments)) if function is verify_chain else function(*arguments)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == torch.int64
            assert torch.equal(a.cpu(), b)
    return expected
