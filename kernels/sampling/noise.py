"""Counter noise: Philox4x32-10 keyed by seed, with (index, position, node, stream) as the counter.

The same key always gives the same number, so a sample's randomness depends on nothing but its own seed and place in
its own text: not on the row it sits in, its neighbours, the batch size or how many steps were needed. A (position,
node) pair never recurs within one stream of one sample: the root of the tree moves strictly forward, hence the depth
at which a given position is drafted strictly decreases from step to step. (Coupled verification is the
exception, on purpose: there a position has one noise, for target and drafts, in every step.)

On a CPU with a compiler the numbers come from C++: traced into a graph, every use would unroll ten rounds of integer
arithmetic, which takes Inductor minutes. Triton kernels call the device functions below.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from specdec.kernels.cpu import address, build
from specdec.kernels.library import jit, register, tl, triton

# One stream per use of noise; two uses never share a number, except that coupled drafts are drawn with the target's. A
# draw from a long row uses a second stream, this far from its own, to choose among blocks of the row (see
# specdec.kernels.sampling.draw).
DRAFT, ACCEPT, BONUS = 0, 1, 2
BLOCK_STREAM = 1 << 16

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
    c3 = torch.as_tensor(c3, device=seed.device, dtype=torch.int64)
    for _ in range(10):
        hi_b, lo_b = _multiply(_ROUND_B, c2)
        hi_a, lo_a = _multiply(_ROUND_A, c0)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + _KEY_A) & _MASK32, (k1 + _KEY_B) & _MASK32
    return c0, c1, c2, c3


def _to_unit(bits: Tensor) -> Tensor:
    """Unsigned 32 bits to float32 in (0, 1): relative precision is kept near 0, and 1 is never returned."""
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def uniform_reference(seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
    """One float32 uniform in (0, 1) per element.

    Args:
        seed, position, node: int64, all of one shape.
        stream: the use this noise is put to.
    """
    return _to_unit(philox(seed, torch.zeros_like(position), position, node, stream)[0])


def exponential(
    seed: Tensor, position: Tensor, node: Tensor, stream: int, size: int, first: Tensor | None = None
) -> Tensor:
    """Unit exponentials [..., size], float32, strictly positive; `seed`, `position`, `node`: int64 [...].

    They are those of indices `first` (int64 [...], multiples of 4; 0 if not given) to first + size - 1.
    Values near zero, which decide an exponential race, carry full relative precision: with half-precision or
    2^-24-spaced uniforms the tail of a large vocabulary would never win.
    """
    quad = torch.arange((size + 3) // 4, device=seed.device, dtype=torch.int64)
    if first is not None:
        quad = first[..., None] // 4 + quad
    words = philox(seed[..., None], quad, position[..., None], node[..., None], stream)
    bits = torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)[..., :size]
    return -torch.log1p(-_to_unit(bits))


@cache
def _cpp() -> Callable[..., None] | None:
    return build("uniform.cpp", "uniform", (ctypes.c_void_p,) * 4 + (ctypes.c_int64,) * 2)


def uniform_cpu(seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
    """One float32 uniform in (0, 1) per element (see `uniform_reference`)."""
    if (kernel := _cpp()) is None:
        return uniform_reference(seed, position, node, stream)
    keys = [x.contiguous() for x in (seed, position, node)]
    out = torch.empty(seed.shape, dtype=torch.float32, device="cpu")
    kernel(*(address(x, torch.int64) for x in keys), address(out, torch.float32), out.numel(), stream)
    return out


@jit
def philox_words(seed, index, position, node, stream):
    """Four uint32 of Philox4x32-10 with key `seed` and counter (index, position, node, stream): ints or blocks."""
    c0, c1 = tl.cast(index, tl.uint32), tl.cast(position, tl.uint32)
    c2, c3 = tl.cast(node, tl.uint32), tl.cast(stream, tl.uint32)
    return tl.philox(seed, c0, c1, c2, c3)


@jit
def to_unit(bits):
    """uint32 to float32 in (0, 1): exactly `_to_unit`."""
    return tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)


@jit
def to_exponential(bits):
    """uint32 to a unit exponential -log(1 - u), with full relative precision near 0, where 1 - u has lost it."""
    u = to_unit(bits)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
    return tl.where(u < 1 / 16, series, -tl.log(1 - u))


@jit
def unit_uniform(seed, position, node, stream):
    """The uniform in (0, 1) of each key, as op `uniform` gives it; the arguments are ints or blocks that broadcast."""
    bits, _, _, _ = philox_words(seed, 0, position, node, stream)
    return to_unit(bits)


@jit
def unit_exponential(seed, position, node, stream, index):
    """The unit exponential of one index, any int, of one key."""
    w0, w1, w2, w3 = philox_words(seed, index >> 2, position, node, stream)
    word = index & 3
    low, high = tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)
    return to_exponential(tl.where(word < 2, low, high))


@jit
def exponentials(seed, position, node, stream, first, BLOCK: tl.constexpr):
    """Unit exponentials [BLOCK] of one key, of indices `first` to first + BLOCK - 1; both are multiples of 4."""
    quads = (first >> 2) + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = philox_words(seed, quads, position, node, stream)
    # The last joined index varies fastest: w0 w1 w2 w3 of the first quad, then of the next.
    bits = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return to_exponential(tl.reshape(bits, [BLOCK]))


@jit
def _uniform_kernel(seed_ptr, position_ptr, node_ptr, out_ptr, n, stream, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed, position = tl.load(seed_ptr + i, mask=i < n, other=0), tl.load(position_ptr + i, mask=i < n, other=0)
    node = tl.load(node_ptr + i, mask=i < n, other=0)
    tl.store(out_ptr + i, unit_uniform(seed, position, node, stream), mask=i < n)


def uniform_triton(seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
    """One float32 uniform in (0, 1) per element (see `uniform_reference`)."""
    seed, position, node = (x.contiguous() for x in (seed, position, node))
    out = torch.empty(seed.shape, device=seed.device, dtype=torch.float32)
    n = out.numel()
    if n > 0:
        _uniform_kernel[(triton.cdiv(n, 1024),)](seed, position, node, out, n, stream, BLOCK=1024)
    return out


def _uniform_fake(seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
    return torch.empty(seed.shape, device=seed.device, dtype=torch.float32)


uniform = register(
    "uniform(Tensor seed, Tensor position, Tensor node, int stream) -> Tensor",
    cpu=uniform_cpu,
    launcher=uniform_triton,
    fake=_uniform_fake,
    kernel=_cpp,
)
