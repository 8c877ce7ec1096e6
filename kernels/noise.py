"""Counter noise: Philox4x32-10 keyed by seed, with (index, position, node, stream) as the counter.

The same key always gives the same number, so a sample's randomness depends on nothing but its own seed and place in
its own text: not on the row it sits in, its neighbours, the batch size or how many steps were needed. A (position,
node) pair never recurs within one stream of one sample: the root of the tree moves strictly forward, hence the depth
at which a given position is drafted strictly decreases from step to step.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

# One stream per use of noise; two uses never share a number.
DRAFT, ACCEPT, BONUS = 0, 1, 2

_MASK32 = 0xFFFFFFFF
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of `constant * x` for unsigned 32-bit values held in int64, without signed overflow."""
    low = (constant & 0xFFFF) * x
    high = (constant >> 16) * x + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor | int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32. All arguments are int64 and broadcast; results are int64 holding unsigned 32 bits."""
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    c3 = torch.as_tensor(c3, device=seed.device)
    for _ in range(10):
        hi_b, lo_b = _multiply(_ROUND_B, c2)
        hi_a, lo_a = _multiply(_ROUND_A, c0)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + _KEY_A) & _MASK32, (k1 + _KEY_B) & _MASK32
    return c0, c1, c2, c3


def _to_unit(bits: Tensor) -> Tensor:
    """Unsigned 32 bits to float32 in (0, 1): relative precision is kept near 0, and 1 is never returned."""
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def uniform(seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
    """One float32 uniform in (0, 1) per element; `seed`, `position`, `node`: int64, broadcast together."""
    return _to_unit(philox(seed, torch.zeros_like(position), position, node, stream)[0])


def exponential(seed: Tensor, position: Tensor, node: Tensor, stream: int, size: int) -> Tensor:
    """Unit exponentials [..., size], float32, strictly positive; `seed`, `position`, `node`: int64 [...].

    Values near zero, which decide an exponential race, carry full relative precision: with half-precision or
    2^-24-spaced uniforms the tail of a large vocabulary would never win.
    """
    quad = torch.arange((size + 3) // 4, device=seed.device)
    words = philox(seed[..., None], quad, position[..., None], node[..., None], stream)
    bits = torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)[..., :size]
    return -torch.log1p(-_to_unit(bits))
