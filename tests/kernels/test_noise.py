"""Counter noise: known answers, range, independence of keys, and the laws it is turned into."""

from __future__ import annotations

import math

import pytest
import torch
from aot import compiles_without_spilling
from scipy.stats import kstest
from torch import Tensor

from specdec.kernels.library import jit, runs_triton, tl
from specdec.kernels.sampling.noise import (
    ACCEPT,
    BLOCK_STREAM,
    BONUS,
    DRAFT,
    _to_unit,
    exponential,
    exponentials,
    philox,
    philox_words,
    to_exponential,
    uniform,
    uniform_reference,
    uniform_triton,
    unit_exponential,
)

pytestmark = pytest.mark.kernels

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    seed = key[0] | key[1] << 32
    seed -= (seed >> 63) << 64  # as int64 holds it
    words = philox(torch.tensor(seed), *(torch.tensor(c) for c in counter))
    assert [int(w) for w in words] == expected


def test_uniforms_are_never_zero_or_one() -> None:
    ends = torch.tensor([0, 1, 2**24, 2**31, 2**32 - 257, 2**32 - 129, 2**32 - 128, 2**32 - 2, 2**32 - 1])
    unit = _to_unit(ends)
    assert (unit > 0).all()
    assert (unit < 1).all()
    assert torch.equal(unit, unit.sort().values)
    assert unit[1] / unit[0] == 3  # relative precision near zero: 1.5 against 0.5


def test_exponentials_are_positive_and_finite_at_the_ends_of_the_uniforms() -> None:
    values = -torch.log1p(-_to_unit(torch.tensor([0, 2**32 - 1])))
    assert values[0] > 0
    assert values[1].isfinite()
    many = exponential(torch.tensor(3), torch.tensor(4), torch.tensor(5), DRAFT, 1_000_000)
    assert (many > 0).all()
    assert many.isfinite().all()


def _keys(*shape: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Seeds of 64 bits, positions and nodes."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    ranges = (-(2**63), 2**63 - 1), (0, 2**31), (0, 1000)
    return [torch.randint(*ends, shape, generator=generator).to(device) for ends in ranges]


@pytest.mark.parametrize("shape", [(), (1,), (1023,), (1024,), (1025,), (3, 700), (0,)])
@pytest.mark.parametrize("stream", [ACCEPT, 2**31 - 1])
def test_uniforms_are_the_reference_bit_for_bit(
    shape: tuple[int, ...], stream: int, device: torch.device, poisoned: None
) -> None:
    keys = _keys(*shape, device=device)
    assert torch.equal(uniform(*keys, stream), uniform_reference(*keys, stream))


def test_uniforms_of_strided_keys(device: torch.device, poisoned: None) -> None:
    seed, position, node = _keys(40, 6, device=device)
    keys = seed.t(), position[:6, :1].expand(6, 40), node.view(6, 40).flip(1)
    assert torch.equal(uniform(*keys, BONUS), uniform_reference(*keys, BONUS))


def test_uniform_is_a_well_formed_op(device: torch.device) -> None:
    torch.library.opcheck(uniform.op, (*_keys(5, device=device), ACCEPT))


# Everywhere but on the CPU's own path, kernels take their noise from device functions.


@jit
def _noise_kernel(
    seed_ptr, first_ptr, words_ptr, block_ptr, one_ptr, position, node, STREAM: tl.constexpr, BLOCK: tl.constexpr
):
    seed, first = tl.load(seed_ptr), tl.load(first_ptr)
    i = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox_words(seed, i, position, node, STREAM)
    p_words = words_ptr + i * 4
    tl.store(p_words, w0.to(tl.int64))
    tl.store(p_words + 1, w1.to(tl.int64))
    tl.store(p_words + 2, w2.to(tl.int64))
    tl.store(p_words + 3, w3.to(tl.int64))
    tl.store(block_ptr + i, exponentials(seed, position, node, STREAM, first, BLOCK))
    tl.store(one_ptr + i, unit_exponential(seed, position, node, STREAM, first + i))


@jit
def _to_exponential_kernel(bits_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + i, mask=i < n, other=0).to(tl.uint32)
    tl.store(out_ptr + i, to_exponential(bits), mask=i < n)


@pytest.fixture
def triton_device(device: torch.device) -> torch.device:
    if not runs_triton(torch.empty(0, device=device)):
        pytest.skip("Triton kernels run on a GPU or in the interpreter")
    return device


@pytest.mark.parametrize("block", [4, 64, 1024])
@pytest.mark.parametrize("seed", [0, -1, 2**62 + 2**31, 7 - 2**63])
def test_kernels_see_the_reference_noise(seed: int, block: int, triton_device: torch.device) -> None:
    position, node, first, stream = 2**31 - 9, 77, 3 * 4096 + 4, BONUS + BLOCK_STREAM
    seeds, firsts = (torch.tensor(x, device=triton_device) for x in (seed, first))
    words = torch.full((block, 4), -1, device=triton_device)
    together, single = torch.full((2, block), math.nan, device=triton_device)
    _noise_kernel[(1,)](seeds, firsts, words, together, single, position, node, STREAM=stream, BLOCK=block)
    key = [torch.tensor(x) for x in (seed, position, node)]
    expected = philox(key[0], torch.arange(block), key[1], key[2], stream)
    assert torch.equal(words.cpu(), torch.stack(expected, 1))
    noise = exponential(*key, stream, block, first=firsts.cpu())
    assert torch.equal(noise, exponential(*key, stream, first + block)[first:])
    torch.testing.assert_close(together.cpu(), noise, rtol=1e-6, atol=0)
    assert torch.equal(together, single)


def test_exponentials_of_kernels_keep_relative_precision(triton_device: torch.device) -> None:
    ends = torch.tensor([0, 1, 2, 3, 4, 10, 2**31, 2**32 - 257, 2**32 - 128, 2**32 - 1])
    middle = 2 ** (torch.arange(960) / 30)  # every size, and so the places where one formula takes over from another
    bits = torch.cat([ends, middle.long(), torch.arange(2**28 - 20, 2**28 + 20)])
    out = torch.full((len(bits),), math.nan, device=triton_device)
    _to_exponential_kernel[(1,)](bits.to(triton_device), out, len(bits), BLOCK=1024)
    exact = -torch.log1p(-_to_unit(bits).double())
    assert (out.cpu() / exact - 1).abs().max() < 1e-6
    small = bits < 2**20
    assert (out.cpu() / exact - 1)[small].abs().max() < 2e-7


def _sequences() -> dict[str, Tensor]:
    """Noise along each part of the key, the others fixed, and the same once more under other fixed values."""
    n = torch.arange(20_000)
    zero = torch.zeros_like(n)
    return {
        "along seeds": uniform(n, zero, zero, ACCEPT),
        "along high seed words": uniform(n << 32, zero, zero, ACCEPT),
        "along positions": uniform(zero, n, zero, ACCEPT),
        "along nodes": uniform(zero, zero, n, ACCEPT),
        "seed 1": uniform(zero + 1, n, zero, ACCEPT),
        "seed -1": uniform(zero - 1, n, zero, ACCEPT),
        "seed 2^62": uniform(zero + 2**62, n, zero, ACCEPT),
        "node 1": uniform(zero, n, zero + 1, ACCEPT),
        "stream draft": uniform(zero, n, zero, DRAFT),
        "stream bonus": uniform(zero, n, zero, BONUS),
        "shifted": uniform(zero, n + 20_000, zero, ACCEPT),
    }


def test_every_part_of_the_key_gives_uniform_noise() -> None:
    for name, values in _sequences().items():
        assert kstest(values.double().numpy(), "uniform").pvalue > 1e-4, name


def test_different_keys_are_uncorrelated() -> None:
    sequences = _sequences()
    stacked = torch.stack(list(sequences.values())).double()
    bound = 5 / 20_000**0.5
    off_diagonal = torch.corrcoef(stacked) - torch.eye(len(stacked))
    assert off_diagonal.abs().max() < bound
    assert torch.corrcoef(torch.cat([stacked[:, 1:], stacked[:, :-1]])).triu(1).abs().max() < bound


def test_one_number_per_key() -> None:
    """No two different keys in a small box share all their bits, and equal keys give equal numbers."""
    axes = [torch.arange(12), torch.arange(12), torch.arange(12), torch.arange(3)]
    seed, position, node, stream = (x.flatten() for x in torch.meshgrid(*axes, indexing="ij"))
    words = torch.stack(philox(seed, torch.zeros_like(seed), position, node, stream), 1)
    assert len(words.unique(dim=0)) == len(seed)
    again = uniform(seed.flip(0), position.flip(0), node.flip(0), ACCEPT).flip(0)
    assert torch.equal(again, uniform(seed, position, node, ACCEPT))


def test_exponentials_depend_on_every_part_of_the_key() -> None:
    keys = [
        (0, 0, 0, DRAFT),
        (1, 0, 0, DRAFT),
        (2**32, 0, 0, DRAFT),
        (0, 1, 0, DRAFT),
        (0, 0, 1, DRAFT),
        (0, 0, 0, BONUS),
    ]
    rows = [exponential(*(torch.tensor(x) for x in key[:3]), key[3], 4000) for key in keys]
    off_diagonal = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert off_diagonal.abs().max() < 5 / 4000**0.5


@pytest.mark.parametrize("size", [1, 3, 4, 5, 4096])
def test_exponentials_do_not_depend_on_what_is_beside_them(size: int) -> None:
    seed, position, node = torch.tensor([5, 6, -7]), torch.tensor([1, 0, 2]), torch.tensor([0, 3, 1])
    together = exponential(seed, position, node, BONUS, size)
    assert together.shape == (3, size)
    longer = exponential(seed, position, node, BONUS, size + 9)[:, :size]
    assert torch.equal(together, longer)
    for i in range(3):
        assert torch.equal(together[i], exponential(seed[i], position[i], node[i], BONUS, size))


def test_exponentials_follow_their_law() -> None:
    values = exponential(torch.arange(50), torch.arange(50), torch.arange(50), DRAFT, 4000)
    assert kstest(values.flatten().double().numpy(), "expon").pvalue > 1e-4
    assert kstest(values.min(1).values.double().numpy() * 4000, "expon").pvalue > 1e-4  # the end that decides a race
    assert torch.corrcoef(values).sub(torch.eye(50)).abs().max() < 6 / 4000**0.5


LAUNCHES = {"2048 keys": lambda: uniform_triton(*_keys(2048), ACCEPT)}

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
