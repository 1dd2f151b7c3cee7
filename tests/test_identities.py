"""The same identities by exhaustion at tiny widths, and the algebra that verification rests on.

The solver (test_smt) proves formulas at full width from an encoding of them; here words of 4 to 6 bits are
walked through completely with the arithmetic of arrays, so a slip would have to be made twice. The second
half exhausts toy Galois rings: what a coefficient catches, how many roots a polynomial has, what makes a
vector one-hot, and which checks fail alike whatever the secrets are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[np.int64]

# --- masked openings over all words of n bits --------------------------------------------------------------


@cache
def masks(n: int) -> Array:
    """Every multiset of three n-bit components (3, count): the formulas are symmetric in the components."""
    return np.array(list(itertools.combinations_with_replacement(range(1 << n), 3)), np.int64).T


@cache
def openings(n: int, values: int) -> tuple[Array, Array]:
    """z (values, 1) against every mask: z and the components r (3, 1, count)."""
    return np.arange(values, dtype=np.int64)[:, None], masks(n)[:, None, :]


WIDTHS_AND_SHIFTS = [(n, f) for n in (4, 5, 6) for f in range(1, n)]


def truncation_masks(n: int) -> tuple[Array, Array, Array]:
    """Every mask of a truncation: components of n - 2 bits (3, count), the two bits t1, t0 (2, count), and
    the mask itself (count).
    """
    parts = [range(1 << (n - 2))] * 3 + [range(2)] * 2
    v0, v1, v2, high, low = np.array(list(itertools.product(*parts)), np.int64).T
    v, t = np.stack([v0, v1, v2]), np.stack([high, low])
    return v, t, (v.sum(axis=0) + ((2 * high + low) << (n - 2))) % (1 << n)


@pytest.mark.parametrize(("n", "f"), [(n, f) for n in (3, 4, 5, 6) for f in range(1, n - 1)])
def test_truncation(n: int, f: int) -> None:
    """Modulo 2^n as a party computes it: exact for 0 <= z <= 2^(n-2), wrong for some z beyond by 3."""
    ring, quarter = 1 << n, 1 << (n - 2)
    v, (high, low), r = truncation_masks(n)
    over = np.stack([high + low - high * low, high, high * low])
    base = (v >> f).sum(axis=0) + (2 * high + low) * (quarter >> f)
    for z in range(quarter + 4):
        c = (z + r) % ring
        told = c >> (n - 2)
        carry = np.where(told < 3, over[np.minimum(told, 2), np.arange(len(c))], 0)
        y = ((c >> f) - base + carry * (ring >> f)) % ring
        exact = np.array_equal(y, (z + (v % (1 << f)).sum(axis=0)) >> f)
        assert exact is (z < quarter + 3), z


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_truncation_masks_hide_all_of_it_from_every_party(n: int) -> None:
    """Whatever z is, and whichever two components of v and of each bit a party knows: what is opened has
    every value once, over the component of v that it lacks and the bits, which it does not know.
    """
    ring, quarter = 1 << n, 1 << (n - 2)
    v, t, r = truncation_masks(n)
    for z in range(ring):
        c = (z + r) % ring
        for lacks in range(3):
            known = v[(lacks + 1) % 3] * quarter + v[(lacks + 2) % 3]
            seen = np.zeros((quarter * quarter, ring), np.int64)
            np.add.at(seen, (known, c), 1)
            assert (seen == 1).all()
    # The control: without either of the bits some values are not seen.
    for without in t:
        assert len(np.unique(r[(without == 0) & (v[:2] == 0).all(axis=0)])) < ring


@pytest.mark.parametrize(("n", "f"), WIDTHS_AND_SHIFTS)
def test_truncate_and_reduce(n: int, f: int) -> None:
    """T3: modulo 2^(n-f) the uncorrected difference is the quotient, for every z."""
    z, r = openings(n, 1 << n)
    c = (z + r.sum(axis=0)) % (1 << n)
    got = ((c >> f) - (r >> f).sum(axis=0)) % (1 << (n - f))
    want = ((z + (r % (1 << f)).sum(axis=0)) >> f) % (1 << (n - f))
    assert np.array_equal(got, want)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_carry_save(n: int) -> None:
    """R = s + 2m, m the majority of the bits."""
    r0, r1, r2 = masks(n)
    total = r0 + r1 + r2
    s, m = r0 ^ r1 ^ r2, ((r0 ^ r2) & (r1 ^ r2)) ^ r2
    assert np.array_equal(s + 2 * m, total)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8])
def test_sign_and_windows(n: int) -> None:
    """Sign by comparison of the lower bits, and index plus remainder, for every c and r of n bits."""
    c, r = (np.arange(1 << n, dtype=np.int64)[shape] for shape in ((slice(None), None), (None, slice(None))))
    z = (c - r) % (1 << n)
    half = 1 << (n - 1)
    assert np.array_equal((c // half) ^ (r // half) ^ (c % half < r % half), z // half)
    for b in range(1, n):
        k = n - b
        j, d = ((c >> b) - (r >> b)) % (1 << k), c % (1 << b) - r % (1 << b)
        assert np.array_equal(((j << b) + d) % (1 << n), z)
        assert np.array_equal(j, ((z >> b) + (d < 0)) % (1 << k))


@pytest.mark.parametrize("f", [1, 2, 3, 4, 5])
def test_dither_statistics(f: int) -> None:
    """Over uniform masks truncation errs by -2^-f on average, whatever z is; with the shifted offset, by 0.

    The mean square is (1 + 2 * 4^-f) / 3 units^2 and (1 - 4^-f) / 3, whatever z is. A party knows two of the
    three parts of the dither: it is rounding that others may know, not noise that hides anything.
    """
    unit = 1 << f
    low = np.arange(unit, dtype=np.int64)
    dither = (low[:, None, None] + low[:, None] + low).ravel()
    for z in range(unit):
        for shift, recentre, mean, square in ((0, 1, -1, unit**2 + 2), (unit - 1, 0, 0, unit**2 - 1)):
            error = (((z - shift + dither) >> f) - recentre) * unit - z  # in 2^-f
            assert error.sum() == mean * len(error)
            assert 3 * (error * error).sum() == square * len(error)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_lookup_by_rotation(bits: int) -> None:
    """sum_j T[(c - j) mod K] e_j = T[(c - u) mod K] for e one-hot at u; turned by c its one is at c - u."""
    size = 1 << bits
    rng = np.random.default_rng(bits)
    table = rng.integers(0, 1 << 16, size)
    for u, c in itertools.product(range(size), repeat=2):
        e = (np.arange(size) == u).astype(np.int64)
        j = np.arange(size)
        assert (table[(c - j) % size] * e).sum() == table[(c - u) % size]
        rotated = e[(c - j) % size]
        assert rotated.sum() == 1 and rotated[(c - u) % size] == 1


def test_product_of_shares() -> None:
    """The summands x_i y_i + x_i y_{i+1} + x_{i+1} y_i add up to x y: all shares over Z_4, and over GF(2)."""
    for shares in itertools.product(range(4), repeat=6):
        x, y = shares[:3], shares[3:]
        z = [x[i] * y[i] + x[i] * y[(i + 1) % 3] + x[(i + 1) % 3] * y[i] for i in range(3)]
        assert (sum(z) - sum(x) * sum(y)) % 4 == 0
        bits = [x[i] & y[i] ^ x[i] & y[(i + 1) % 3] ^ x[(i + 1) % 3] & y[i] for i in range(3)]
        assert bits[0] ^ bits[1] ^ bits[2] == (x[0] ^ x[1] ^ x[2]) & (y[0] ^ y[1] ^ y[2])


# --- toy Galois rings ------------------------------------------------------------------------------------


class Galois:
    """GR(2^k, d) as arrays (..., d) of coefficients; `tail` holds X^d as a polynomial of lower degree."""

    def __init__(self, k: int, tail: tuple[int, ...]) -> None:
        self.k, self.d, self.tail, self.mask = k, len(tail), tail, (1 << k) - 1

    def mul(self, a: Array, b: Array) -> Array:
        shape = np.broadcast_shapes(a.shape[:-1], b.shape[:-1])
        out = np.zeros((*shape, 2 * self.d - 1), np.int64)
        for i, j in itertools.product(range(self.d), repeat=2):
            out[..., i + j] += a[..., i] * b[..., j]
        for top in range(2 * self.d - 2, self.d - 1, -1):
            for i, coefficient in enumerate(self.tail):
                out[..., top - self.d + i] += coefficient * out[..., top]
        return out[..., : self.d] & self.mask

    def add(self, *terms: Array) -> Array:
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total & self.mask

    def elements(self, below: int | None = None) -> Array:
        """All elements with coefficients below `below` (all of them by default); (2, d) zeros first."""
        values = range(below or self.mask + 1)
        return np.array(list(itertools.product(values, repeat=self.d)), np.int64)

    def exceptional(self) -> Array:
        """The 2^d elements with coefficients 0 and 1, from which coins are drawn; zero is the first."""
        return self.elements(2)

    def lift(self, x: Array) -> Array:
        return np.concatenate([x[..., None], np.zeros((*x.shape, self.d - 1), np.int64)], axis=-1) & self.mask


def is_zero(x: Array) -> npt.NDArray[np.bool_]:
    return np.logical_not(np.asarray(x.any(axis=-1)))


GR_4_2 = Galois(2, (1, 1))  # X^2 = X + 1 over Z_4 (mod 2 irreducible, which is all that is needed)
GR_4_3 = Galois(2, (1, 1, 0))  # X^3 = X + 1
GR_16_3 = Galois(4, (1, 1, 0))
RINGS = pytest.mark.parametrize("ring", [GR_4_2, GR_4_3, GR_16_3], ids=["GR(4,2)", "GR(4,3)", "GR(16,3)"])


@RINGS
def test_differences_of_coins_are_units(ring: Galois) -> None:
    """An element is a unit iff it is not 0 mod 2; hence so is any difference of two distinct coins."""
    elements, one = ring.elements(), ring.lift(np.ones(1, np.int64))[0]
    coins = ring.exceptional()
    for a, b in itertools.permutations(coins, 2):
        inverse = is_zero((ring.mul(elements, a - b) - one) & ring.mask)
        assert inverse.sum() == 1
    for a in elements:
        if not (a & 1).any():
            assert is_zero(ring.mul(ring.lift(np.array(1 << (ring.k - 1))), a))  # a zero divisor


@RINGS
def test_coin_catches_top_bit_error(ring: Galois) -> None:
    """protocol.md 5: an error 2^(k-1) e survives a 0/1-coefficient coin with probability 2^-d exactly.

    e runs over the whole ring (its class modulo 2 matters); only the coin 0 misses it.
    """
    coins, half = ring.exceptional(), 1 << (ring.k - 1)
    errors = half * ring.elements() & ring.mask
    errors = errors[~is_zero(errors)]
    missed = is_zero(ring.mul(errors[:, None], coins))
    assert (missed.sum(axis=1) == 1).all() and missed[:, 0].all()


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_plain_coefficient_misses_top_bit_error(k: int) -> None:
    """A coefficient from Z_{2^k} misses a top-bit error half of the time, however many are combined."""
    ring, half = 1 << k, 1 << (k - 1)
    for count in (1, 2, 3):
        r = np.array(list(itertools.product(range(ring), repeat=count)), np.int64)
        for hit in itertools.product((0, 1), repeat=count):
            if any(hit):
                missed = (r @ (half * np.array(hit)) % ring == 0).sum()
                assert 2 * missed == len(r)


@RINGS
def test_combination_of_errors(ring: Galois) -> None:
    """r_1 e_1 + r_2 e_2 = 0 for at most one coin in 2^d on average: errors of any size, not only top bits."""
    coins = ring.exceptional()
    values = np.arange(ring.mask + 1, dtype=np.int64)
    e1, e2 = (x.ravel()[1:] for x in np.meshgrid(values, values))
    first = ring.mul(ring.lift(e1)[:, None], coins)
    second = ring.mul(ring.lift(e2)[:, None], coins)
    missed = is_zero(ring.add(first[:, :, None], second[:, None, :])).sum(axis=(1, 2))
    assert missed.max() == len(coins)  # of len(coins)^2 pairs


def test_freivalds_on_both_sides() -> None:
    """chi^T E psi = 0 for a wrong matrix product: at most 2 * 2^-d with coins; with plain coefficients 3/4.

    Every error E of 2 x 2 over Z_4 against every pair of coin vectors over GR(4, 2).
    """
    errors = np.array(list(itertools.product(range(4), repeat=4)), np.int64)[1:].reshape(-1, 2, 2)
    ring, coins = GR_4_2, GR_4_2.exceptional()
    vectors = coins[np.array(list(itertools.product(range(4), repeat=2)))]  # (16, 2, d)
    worst = 0.0
    for e in errors:
        right = np.einsum("ij,vjd->vid", e, vectors) & ring.mask  # E psi, (16, 2, d)
        products = ring.mul(vectors[:, None], right[None])
        worst = max(worst, float(is_zero(products.sum(axis=2) & ring.mask).mean()))
    assert worst == 7 / 16 <= 2 / len(coins)
    plain = np.array(list(itertools.product(range(4), repeat=2)), np.int64)
    missed = [float((plain @ e @ plain.T % 4 == 0).mean()) for e in errors]
    assert max(missed) == 3 / 4


def test_roots_among_coins() -> None:
    """A polynomial of degree at most 2 over GR(4, 2), not zero, has at most 2 roots among the coins.

    Among all elements of the ring it can have more (2 X has as many as there are zero divisors).
    """
    ring, coins = GR_4_2, GR_4_2.exceptional()
    elements = ring.elements()
    c0, c1, c2 = (elements[i.ravel()] for i in np.meshgrid(*[np.arange(16)] * 3, indexing="ij"))

    def roots(points: Array) -> Array:
        squares = ring.mul(points, points)
        values = ring.add(c0[:, None], ring.mul(c1[:, None], points), ring.mul(c2[:, None], squares))
        return np.asarray(is_zero(values).sum(axis=1))[1:]  # the zero polynomial is the first

    assert roots(coins).max() == 2
    assert roots(elements).max() > 2


def test_halving() -> None:
    """One halving of <a, w> = c: complete if c is right; if c is wrong, at most 2 coins of 2^d hide it.

    The cheater may add any errors to h(0) and to the leading coefficient, since the parties derive h(1) from
    c. Whatever it adds, over GR(4, 2) the wrong claim survives under at most 2 of the 4 coins.
    """
    ring, coins = GR_4_2, GR_4_2.exceptional()
    rng = np.random.default_rng(1)
    a, w = (rng.integers(0, 4, (200, 2, ring.d)) for _ in range(2))

    def inner(x: Array, y: Array) -> Array:
        return ring.mul(x, y)

    h0 = inner(a[:, 0], w[:, 0])
    h2 = inner(a[:, 1] - a[:, 0], w[:, 1] - w[:, 0])
    c = ring.add(h0, inner(a[:, 1], w[:, 1]))
    for xi in coins:
        at = ring.add(h0, ring.mul(xi, ring.add((c - h0) - h0 - h2, ring.mul(xi, h2))))
        folded = [x[:, 0] + ring.mul(xi, x[:, 1] - x[:, 0]) for x in (a, w)]
        assert np.array_equal(at, inner(folded[0], folded[1]))
    elements = ring.elements()
    wrong, e0, e2 = (elements[i.ravel()] for i in np.meshgrid(*[np.arange(16)] * 3, indexing="ij"))
    hidden = np.zeros(len(wrong), np.int64)
    for xi in coins:
        slope = (wrong - e0) - e0 - e2
        hidden += is_zero(ring.add(e0, ring.mul(xi, ring.add(slope, ring.mul(xi, e2)))))
    assert hidden[~is_zero(wrong)].max() == 2


def test_final_opening() -> None:
    """<t a + mask, w> = t c + product, errors in c and product: a wrong c passes under at most one coin t."""
    ring, coins = GR_4_3, GR_4_3.exceptional()
    elements = ring.elements()
    for wrong in elements[1:]:
        residue = ring.add(ring.mul(coins, wrong)[None], elements[:, None])
        assert is_zero(residue).sum(axis=1).max() == 1


# --- bits and one-hots -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(1, 11))
def test_only_bits_are_idempotent(k: int) -> None:
    """x^2 = x modulo 2^k leaves 0 and 1."""
    x = np.arange(1 << k, dtype=np.int64)
    assert np.flatnonzero(x * x % (1 << k) == x).tolist() == [0, 1]


def _by_bits(k: int, low: int) -> Iterator[tuple[Array, tuple[int, int], Array]]:
    """All vectors u (.., 4) over Z_{2^k} with each pair of "bits" b, and all (b_t - j_t) u_j (.., 2, 4); of b
    those whose low bits are those of `low` alone.
    """
    u = np.array(list(itertools.product(range(1 << k), repeat=4)), np.int64)
    j = np.arange(4)
    for b in itertools.product(range(low & 1, 1 << k, 2), range(low >> 1, 1 << k, 2)):
        yield u, b, np.stack([(b[t] - (j >> t & 1)) * u for t in range(2)], axis=1) % (1 << k)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_one_hot_relations(k: int) -> None:
    """(b_t - j_t) u_j = 0 and sum u = 1: over Z_{2^k}, u is the unit vector at b, and b are bits.

    So of all b with given low bits one is left, and one u. Each part is needed: without the sum u may be 0,
    and without the low bits b is any index.
    """
    hot = np.eye(4, dtype=np.int64)
    for index in range(4):
        left = []
        for u, b, terms in _by_bits(k, index):
            fine = (terms == 0).all(axis=(1, 2))
            assert fine[0] and not u[0].any(), "0 is excluded by the sum alone"
            left += [(b, tuple(v)) for v in u[fine & (u.sum(axis=1) % (1 << k) == 1)].tolist()]
        assert left == [((index & 1, index >> 1), tuple(hot[index].tolist()))]


def test_one_hot_by_one_coin() -> None:
    """b <q, u> = sum_j j q_j u_j for elements b and j with the bits as coordinates and coins q: true where
    every (b_t - j_t) u_j is 0, else missed with at most 2^-d.

    All u of length 4 and all b over Z_4, errors of the top bit alone among them; all q over GR(4, 2).
    """
    ring, coins = GR_4_2, GR_4_2.exceptional()
    q = coins[np.array(list(itertools.product(range(len(coins)), repeat=4)))]  # (256, 4, d)
    powers = np.eye(2, dtype=np.int64)  # X^t
    products = ring.mul(powers[None, :, None], q[:, None])  # (256, 2, 4, d)
    for low in range(4):
        for _, _, terms in _by_bits(2, low):
            value = np.tensordot(terms, products, ([1, 2], [1, 2])) & ring.mask  # (u, 256, d)
            missed = is_zero(value).mean(axis=1)
            violated = terms.any(axis=(1, 2))
            assert (missed[~violated] == 1).all()
            assert (missed[violated] <= 1 / len(coins)).all()


def _injections(k: int) -> Iterator[tuple[tuple[int, ...], int, int, int, int]]:
    """Bits, errors and products of XOR by two ring products, an error added to each: (bits, e1, e2, x, y)."""
    ring = 1 << k
    for bits in itertools.product((0, 1), repeat=3):
        for e1, e2 in itertools.product(range(ring), repeat=2):
            x = (bits[0] + bits[1] - 2 * (bits[0] * bits[1] + e1)) % ring
            y = (x + bits[2] - 2 * (x * bits[2] + e2)) % ring
            yield bits, e1, e2, x, y


@pytest.mark.parametrize("k", [3, 4])
def test_injection_must_state_its_first_product(k: int) -> None:
    """XOR in the ring: which checks accept an error depending on secret bits, and which never do.

    Checking only the result (y^2 = y, and its low bit) lets errors e and -e in the two products cancel when
    the last bit is 0 and show when it is 1: what is accepted is right, but acceptance tells a secret bit.
    Stating the first product as a relation of its own removes that: then acceptance depends on errors alone.
    """
    ring = 1 << k
    by_result: dict[tuple[int, int], set[bool]] = {}
    by_first: dict[tuple[int, int], set[bool]] = {}
    for bits, e1, e2, _, y in _injections(k):
        truth = bits[0] ^ bits[1] ^ bits[2]
        accepted = y * y % ring == y and y % 2 == truth
        assert not accepted or y == truth
        by_result.setdefault((e1, e2), set()).add(accepted)
        by_first.setdefault((e1, e2), set()).add(accepted and e1 == 0)
    assert by_result[1, ring - 1] == {True, False}
    assert all(len(outcomes) == 1 for outcomes in by_first.values())
    assert {e for e, outcomes in by_first.items() if True in outcomes} == {(0, 0), (0, ring // 2)}


@pytest.mark.parametrize("k", [3, 4])
def test_injection_by_both_products(k: int) -> None:
    """z1 = a b, and z2 = x c for x = a + b - 2 z1 as shared, leave one result of all z1 and z2: the XOR.

    If one of the two is not stated, wrong results are left, whatever the bits.
    """
    ring = 1 << k
    for a, b, c in itertools.product((0, 1), repeat=3):
        left: dict[tuple[bool, bool], set[int]] = {}
        for z1, z2 in itertools.product(range(ring), repeat=2):
            x = (a + b - 2 * z1) % ring
            y = (x + c - 2 * z2) % ring
            left.setdefault((z1 == a * b, z2 == x * c % ring), set()).add(y)
        assert left[True, True] == {a ^ b ^ c}
        assert left[False, True] - {a ^ b ^ c} and left[True, False] - {a ^ b ^ c}


def test_doubling_errors_of_a_value_never_cancel() -> None:
    """Any value over Z_8 put at its place by two doublings, errors added to each product: (b_t - j_t) e_j = 0
    leaves the honest outcome alone, also where the value is even or 0, since b are bits by a relation of
    their own.

    So they must be: where a value is even or 0 other b pass as well, which no odd value, such as 1, allows.
    """
    ring = 8
    errors = np.array(list(itertools.product(range(ring), repeat=3)), np.int64)
    honest = ~errors.any(axis=1)
    weights = np.arange(4)

    def stated(e: Array, b: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        terms = np.stack([(b[t] - (weights >> t & 1)) * e for t in range(2)]) % ring
        return np.asarray((terms == 0).all(axis=(0, 2)))

    for value in range(ring):
        for b in itertools.product((0, 1), repeat=2):
            e = np.full((len(errors), 1), value)
            for bit, error in zip(b, (errors[:, :1], errors[:, 1:]), strict=True):
                high = e * bit + error
                e = np.concatenate([e - high, high], axis=1) % ring
            assert (e.sum(axis=1) % ring == value).all(), "the sum tells nothing"
            assert np.array_equal(stated(e, b), honest)
            assert np.array_equal(e[honest][0], value * (weights == b[0] + 2 * b[1]))
        # Whatever stands at one place, and 0 elsewhere: with which b does it pass?
        passing = {
            b
            for b in itertools.product(range(ring), repeat=2)
            if stated(value * (weights == (b[0] & 1) + 2 * (b[1] & 1))[None], b)[0]
        }
        bits = set(itertools.product((0, 1), repeat=2))
        assert (passing == bits) is (value % 2 == 1) and passing >= bits


def test_a_one_hot_of_1_proves_the_bits_that_values_stand_by() -> None:
    """A vector of 1 and one of a value, doubled by a bit that has an error of its own, over Z_8: what passes
    follows from the errors, whatever the bit and the value are.
    """
    ring = 8
    outcomes: dict[tuple[int, ...], set[bool]] = {}
    by_value: dict[tuple[int, ...], set[bool]] = {}
    for b, value, e, *errors in itertools.product((0, 1), *[range(ring)] * 4):
        bit = b - 2 * e
        fine = []
        for of, error in zip((1, value), errors, strict=True):
            high = of * bit + error
            fine.append(not (bit * (of - high) % ring or (bit - 1) * high % ring))
        outcomes.setdefault((e, *errors), set()).add(all(fine))
        by_value.setdefault((e, errors[1]), set()).add(fine[1])
    assert all(len(found) == 1 for found in outcomes.values())
    assert [errors for errors, found in outcomes.items() if True in found] == [(0, 0, 0), (ring // 2, 0, 0)]
    assert by_value[ring // 4, 0] == {True, False}, "alone the value tells whether it is even"


def test_one_hot_relations_over_gf2() -> None:
    """(b_t + j_t) e_j = 0 and sum e = 1 over GF(2): e is the unit vector at b; without the sum it may be 0.

    With coins q for the entries, b <q, e> = sum_j j q_j e_j misses what is violated with 1 / |field| at most:
    all e of length 4, all b, all q over GF(8).
    """

    def times(x: Array, y: Array) -> Array:  # modulo X^3 + X + 1
        z = np.bitwise_xor.reduce([np.where(y >> i & 1, x << i, 0) for i in range(3)])
        for i in (4, 3):
            z = np.where(z >> i & 1, z ^ (0b1011 << i - 3), z)
        return np.asarray(z)

    e = np.array(list(itertools.product((0, 1), repeat=4)), np.int64)
    q = np.array(list(itertools.product(range(8), repeat=4)), np.int64)
    entries = np.arange(4)
    for b in range(4):
        fine = ~(e * (b ^ entries)).any(axis=1)
        assert e[fine].tolist() == [[0] * 4, (entries == b).astype(int).tolist()]
        value = np.bitwise_xor.reduce(times(q, b ^ entries)[None] * e[:, None], axis=2)
        missed = (value == 0).mean(axis=1)
        assert (missed[fine] == 1).all() and (missed[~fine] <= 1 / 8).all()


@pytest.mark.parametrize("ring", [2, 4])
def test_doubling_errors_never_cancel(ring: int) -> None:
    """One-hot of three bits by two doublings, errors added to each product: only no error is right.

    The two halves of a doubling add up to what was doubled, so an error stays visible whatever the later
    bits are: the result differs from the true one-hot for *every* value of the bits, or for none. With the
    sum, and the relation that leaves only the true one-hot, acceptance therefore depends on the errors alone.
    """
    first = np.array(list(itertools.product(range(ring), repeat=2)), np.int64)
    second = np.array(list(itertools.product(range(ring), repeat=4)), np.int64)
    d1 = np.repeat(first, len(second), axis=0)
    d2 = np.tile(second, (len(first), 1))
    honest = ~d1.any(axis=1) & ~d2.any(axis=1)
    for b0, b1, b2 in itertools.product((0, 1), repeat=3):
        e = np.broadcast_to(np.array([1 - b0, b0]), d1.shape)
        for b, error in ((b1, d1), (b2, d2)):
            high = e * b + error
            e = np.concatenate([e - high, high], axis=1) % ring
        truth = np.arange(8) == b0 + 2 * b1 + 4 * b2
        assert np.array_equal((e == truth).all(axis=1), honest)
