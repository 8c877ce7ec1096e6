"""Where a row of logits is cut, in few passes over it: each tells how much of the row reaches each of P pivots.

Let C(v) be how many logits are v at least and M(v) the sum of their weights exp2((x - best) * slope). Both fall with v.
Top-k keeps what reaches the largest v with C(v) >= k, and top-p of that what reaches the largest v with M(v) >= need,
where `need` is top_p times the mass that top-k keeps, but no less than the best token's 1. What a pass tells of its
pivots puts each of the two between two of them, and the next pass spreads its pivots between those. Top-p's `need` is
known as well as the mass that top-k keeps, so that both are searched for at the same time.

The first pass' pivots are evenly spread in what a logit weighs, where almost all cuts are, and later ones among the
numbers that the logits' dtype has. Each pass has the ends of its brackets among its pivots, so that it needs
nothing of the one before, and so do the answers. The sums are made in a fixed order: the same row gives the same law.

Pivot 0 is min-p's: its cut is known beforehand, and only the mass above it is not.

Letters: P pivots, S splits of a row. Source: bisection by more than one probe, as in Alabi et al., "Fast k-selection
algorithms for graphics processing units", JEA 2012.
"""

from __future__ import annotations

from specdec.kernels.library import jit, tl

PIVOTS = 32
"""P. A pass reads so little that 32 comparisons a logit take no longer; they stay in a thread's registers."""


@jit
def key(x, SHIFT: tl.constexpr):
    """int64 in the order of float32 `x`, -0 = +0, one for each number of a dtype that has SHIFT bits less. What lies
    between two of its numbers is rounded up, which leaves `logit >= x` as it is."""
    bits = x.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits).to(tl.int64)
    return -((-order) >> SHIFT)


@jit
def value(k, SHIFT: tl.constexpr):
    """The float32 of a key."""
    magnitude = (tl.abs(k) << SHIFT).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(k < 0, -magnitude, magnitude)


@jit
def first_pivots(best, slope, min_p, V, SHIFT: tl.constexpr, P: tl.constexpr):
    """Min-p's cut, -inf, steps up to the best logit, and what is above it: float32 [P].

    Most steps go evenly to where a logit weighs 1 / (128 V) of the best: with a top_p up to 0.99, what is below may be
    cut. The others go twice as far every time, for a top-k of rows that are that wide.
    """
    EVEN: tl.constexpr = P - 10
    j = tl.arange(0, P)
    step = (P - 2 - j).to(tl.float32)
    far = (tl.log2(tl.cast(V, tl.float32)) + 7) * tl.where(step <= EVEN, step / EVEN, tl.exp2(step - EVEN))
    pivots = tl.where(j == 1, -float("inf"), best - far / slope)
    least = tl.where(min_p < 1, best + tl.log2(tl.maximum(min_p, 0.0)) / slope, best)
    keys = key(tl.where(j == 0, least, pivots), SHIFT)
    return value(tl.where(j == P - 1, key(best, SHIFT) + 1, keys), SHIFT)


@jit
def _spread(low, high, i, n, SHIFT: tl.constexpr):
    """Keys i = 0 ... n - 1 from `low` to `high`. Half of all numbers are less than 1: where the two are of different
    sign or magnitude, every other key is instead of values evenly spread."""
    keys = low + (high - low) * i // (n - 1)
    part = i / (n - 1)
    values = tl.maximum(value(low, SHIFT), -3e38) * (1 - part) + tl.minimum(value(high, SHIFT), 3e38) * part
    is_of_value = (high - low > 1 << (23 - SHIFT)) & (i % 2 == 1) & (i < n - 1)
    return tl.where(is_of_value, tl.minimum(tl.maximum(key(values, SHIFT), low), high), keys)


@jit
def reaching(p_row, stride_lv, begin, end, best, slope, pivots, P: tl.constexpr):
    """How many of a row's logits from `begin` to `end` reach each pivot, and their weights: float32 [P] both."""
    LANES: tl.constexpr = 128  # a logit, and all pivots, a thread
    TURNS: tl.constexpr = 8
    counts = tl.zeros([P, LANES], tl.float32)
    masses = tl.zeros([P, LANES], tl.float32)
    for start in range(begin, end, TURNS * LANES):
        for turn in tl.static_range(TURNS):
            i = start + turn * LANES + tl.arange(0, LANES)
            x = tl.load(p_row + i.to(tl.int64) * stride_lv, mask=i < end, other=float("nan")).to(tl.float32)
            weights = tl.where(i < end, tl.exp2((x - best) * slope), 0.0)
            reaches = (x[None, :] >= pivots[:, None]).to(tl.float32)
            counts += reaches
            masses += reaches * weights[None, :]
    return tl.sum(counts, 1), tl.sum(masses, 1)


@jit
def load_sums(pivots_ptr, sums_ptr, i_t, n_splits, SPLITS: tl.constexpr, P: tl.constexpr):
    """Pivots [P] of a row, and counts and masses [SPLITS, P] of its slices, 0 from `n_splits` on."""
    j, o_s = tl.arange(0, P), tl.arange(0, SPLITS)
    p_sums = sums_ptr + (i_t * n_splits + o_s)[:, None] * 2 * P + j[None, :]
    is_there = (o_s < n_splits)[:, None]
    counts, masses = tl.load(p_sums, mask=is_there, other=0.0), tl.load(p_sums + P, mask=is_there, other=0.0)
    return tl.load(pivots_ptr + i_t * P + j), counts, masses


@jit
def narrowed(pivots, all_counts, all_masses, k, top_p, SHIFT: tl.constexpr, P: tl.constexpr):
    """What a pass told, of pivots [P], all slices' counts and masses [SPLITS, P].

    Returns:
        following: the next pass' pivots.
        low, high: keys; what reaches `low` is kept or between `low` and `high`, what reaches `high` is kept.
        need: the mass that top-p keeps at least.
        is_done: nothing, or one logit, or only equals are between `low` and `high`.
    """
    NONE: tl.constexpr = 1 << 40
    j, keys = tl.arange(0, P), key(pivots, SHIFT)
    counts, masses = tl.sum(all_counts, 0), tl.sum(all_masses, 0)
    k = tl.cast(k, tl.float32)  # Triton makes a 1 a constant
    # Top-k's cut is `low_k` at least, and less than `high_k`. With `has_k`, `low_k` will do.
    in_k = counts >= k
    low_k = tl.max(tl.where(in_k, keys, -NONE), 0)
    high_k = tl.min(tl.where(in_k, NONE, keys), 0)
    has_k = (tl.min(tl.where(in_k, counts, float("inf")), 0) == k) | (high_k - low_k <= 1)
    # So top-p refers to a mass between these. Without top-p the cut of both is top-k's.
    most = tl.min(tl.where(in_k, masses, float("inf")), 0)
    least = tl.where(has_k, most, tl.max(tl.where(in_k, 0.0, masses), 0))
    need = tl.maximum(top_p * most, 1.0)
    surely = tl.where(top_p < 1, masses >= need, in_k)
    maybe = tl.where(top_p < 1, masses >= tl.maximum(top_p * least, 1.0), in_k)
    low = tl.max(tl.where(surely, keys, -NONE), 0)
    high = tl.min(tl.where(maybe, NONE, keys), 0)
    between = tl.min(tl.where(surely, counts, float("inf")), 0) - tl.max(tl.where(maybe, 0.0, counts), 0)
    is_done = has_k & ((top_p >= 1) | (between <= 1) | (high - low <= 1))
    # Half of the next pivots go from `low_k` to `high_k`, or only two, and the others from `low` to `high`.
    n_k = tl.where(has_k, 2, P // 2 - 1)
    of_k = _spread(low_k, high_k, j - 1, n_k, SHIFT)
    of_p = _spread(low, high, j - 1 - n_k, P - 1 - n_k, SHIFT)
    following = tl.where(j == 0, pivots, value(tl.where(j <= n_k, of_k, of_p), SHIFT))
    return following, low, high, need, is_done
