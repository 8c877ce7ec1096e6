"""How far back layers see, by what they say: to their attention, by their masks' rules, and to their cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Asked:
    """What a layer asked of its attention: a window, 0 for none, and sinks; and the rule of the mask it brought, None
    for a mask of its own making."""

    window: int
    has_sinks: bool
    rule: Callable[..., Tensor] | None


def named_windows(config: Any) -> dict[str, int]:
    """What a configuration says of lengths that a layer may behave differently beyond, by its words for them."""
    return {
        name: value
        for name, value in vars(config).items()
        if ("window" in name or "chunk" in name) and type(value) is int and value > 0
    }


def is_window(rule: Callable[..., Tensor], window: int, longest: int, device: torch.device) -> bool:
    """Whether a mask rule lets a token see just itself and what is before it, the last `window` tokens if that is not
    0. Asked at the window's edges, and as far as texts go."""
    query, key = _places(window, longest, device)
    seen = _seen(rule, query, key)
    return seen is not None and torch.equal(seen, (key <= query) & ((key > query - window) if window else True))


def is_within(rule: Callable[..., Tensor], window: int, longest: int, device: torch.device) -> bool:
    """Whether a mask rule lets a token see nothing before the last `window` tokens; asked as in `is_window`."""
    query, key = _places(window, longest, device)
    seen = _seen(rule, query, key)
    return seen is not None and not bool((seen & (key <= query - window)).any())


def _places(window: int, longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions [n, 1] of a few queries, and [1, m] of all keys."""
    last = max(min(longest, 2**20), 2 * window + 2, 1024)
    places = {0, 1, 5, 6, *(window + i for i in (-1, 0, 1, 7)), 2 * window + 1, last // 2, last - 1}
    query = torch.tensor(sorted(p for p in places if 0 <= p < last), device=device, dtype=torch.int64)
    return query[:, None], torch.arange(last, device=device, dtype=torch.int64)[None]


def _seen(rule: Callable[..., Tensor], query: Tensor, key: Tensor) -> Tensor | None:
    """[n, m] bool, which keys the queries see; None where the rule cannot say it."""
    zero = torch.zeros((), dtype=torch.int64, device=query.device)
    try:
        return rule(zero, zero, query, key).expand(len(query), key.shape[1])
    except Exception:
        return None
