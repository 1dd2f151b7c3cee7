"""Every formula that finishes an opening, proved by an SMT solver at the width at which it runs.

Two encodings are used. Words are bit-vectors, as the machine computes them. Statements about quotients and
remainders are also given to the solver as integer arithmetic, where it proves all shifts in a second; there
a word is an integer below 2^64 and every reduction is written out. Each assumption that a formula needs is
shown to be needed: without it the solver must find a counterexample, which also shows that the encoding is
not empty.

DESIGN.md cites the tests by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

z3 = pytest.importorskip("z3", reason="pip install z3-solver")

N = 64
LARGEST = 1 << (N - 2)  # of what a truncation masks
MODULUS = 1 << N
SOLVER_LIMIT_MS = 30_000
SHIFTS = range(1, 62)


def _solve(*facts: Any) -> Any:
    solver = z3.Solver()
    solver.set("timeout", SOLVER_LIMIT_MS)
    solver.add(*facts)
    verdict = solver.check()
    assert verdict != z3.unknown, f"no answer within {SOLVER_LIMIT_MS} ms: {solver.reason_unknown()}"
    return solver.model() if verdict == z3.sat else None


def prove(claim: Any, *given: Any) -> None:
    """Fail with a counterexample unless `claim` follows from `given`."""
    counterexample = _solve(*given, z3.Not(claim))
    assert counterexample is None, f"counterexample: {counterexample}"


def possible(*facts: Any) -> None:
    """Fail unless all `facts` can hold at once."""
    assert _solve(*facts) is not None, "these facts exclude one another"


# --- integers ----------------------------------------------------------------------------------------


class Masked:
    """z and three mask components as integers below 2^n, and c = z + r mod 2^n."""

    def __init__(self, n: int) -> None:
        self.z, *self.r = z3.Ints("z r0 r1 r2")
        self.words = [z3.And(0 <= x, x < 1 << n) for x in (self.z, *self.r)]
        self.c = (self.z + sum(self.r)) % (1 << n)


class Truncated:
    """A mask r = 2^62 u + v, u two bits and v a sum of three components, z under it, and what the parties
    compute.
    """

    def __init__(self, f: int) -> None:
        self.unit = unit = 1 << f
        self.z, self.high, self.low, *self.v = z3.Ints("z t1 t0 v0 v1 v2")
        bits = (self.high, self.low)
        self.mask = [*(z3.And(0 <= x, x < LARGEST) for x in self.v), *(z3.And(0 <= t, t <= 1) for t in bits)]
        self.inside = z3.And(0 <= self.z, self.z <= LARGEST)
        self.u = 2 * self.high + self.low
        self.below = self.z + sum(self.v)  # the sum without u, over the integers
        self.c = (self.below + LARGEST * self.u) % MODULUS
        self.told = self.c / LARGEST  # for integers, z3 writes floor division as /
        both = z3.If(self.high + self.low == 2, 1, 0)
        self.over = (self.high + self.low - both, self.high, both)
        self.carry = z3.If(self.told == 3, 0, pick(self.told, self.over))
        self.base = sum(x / unit for x in self.v) + (LARGEST >> f) * self.u
        self.dither = sum(x % unit for x in self.v)
        self.floor = (self.z + self.dither) / unit  # what truncation must return
        self.result = self.c / unit - self.base + (MODULUS >> f) * self.carry


def pick(at: Any, values: Sequence[Any]) -> Any:
    """Of several values that at which `at` points; the last one for what is beyond."""
    first, *others = values
    return z3.If(at == 0, first, pick(at - 1, others)) if others else first


@pytest.mark.parametrize("f", SHIFTS)
def test_truncation(f: int) -> None:
    """At 64 bits, all shifts: for 0 <= z <= 2^62 the quotient is exact over the integers, which implies that
    it is so modulo 2^64, where the parties compute.

    floor((z + sum(v_i mod 2^f)) / 2^f) = (c >> f) - base + 2^(64-f) over[c >> 62].
    """
    m = Truncated(f)
    prove(m.result == m.floor, *m.mask, m.inside)


def test_whether_the_mask_carries() -> None:
    """z + r passes 2^64 once or not at all, and [u > c >> 62] tells which: that is in u's thermometer."""
    m = Truncated(1)
    passes = (m.below + LARGEST * m.u) / MODULUS
    prove(passes == z3.If(m.u > m.told, 1, 0), *m.mask, m.inside)
    prove(passes == m.carry, *m.mask, m.inside)
    for k, over in enumerate(m.over):
        prove(over == z3.If(m.u > k, 1, 0), *m.mask)
        possible(*m.mask, m.inside, m.told == k, over == 1, passes == 1)
        possible(*m.mask, m.inside, m.told == k, over == 0, passes == 0)
    prove(passes == 0, *m.mask, m.inside, m.told == 3)


def test_truncation_needs_its_range_and_all_of_the_correction() -> None:
    """Beyond 2^62 + 2 a wrong result exists, and without any of the three bits, or u in the base: no part is
    idle.
    """
    m = Truncated(16)
    prove(m.result == m.floor, *m.mask, 0 <= m.z, m.z <= LARGEST + 2)
    possible(*m.mask, m.z == LARGEST + 3, m.result != m.floor)
    possible(*m.mask, m.inside, m.result + (LARGEST >> 16) * m.u != m.floor)
    for k in range(3):
        possible(*m.mask, m.inside, m.told == k, m.c / m.unit - m.base != m.floor)


@pytest.mark.parametrize("f", SHIFTS)
def test_truncation_bound(f: int) -> None:
    """The dither moves the quotient by 0, 1, 2 or 3 units (by at most 2 if f = 1), and each of these happens.

    Against the real quotient: -(1 - 2^-f) <= y - z / 2^f <= 3 (1 - 2^-f), both ends attained.
    """
    m = Truncated(f)
    extra = m.floor - m.z / m.unit
    most = 3 if f > 1 else 2
    prove(z3.And(0 <= extra, extra <= most), *m.mask)
    for value in range(most + 1):
        possible(*m.mask, m.inside, extra == value)
    error = m.unit * m.floor - m.z  # in units of 2^-f
    prove(z3.And(-(m.unit - 1) <= error, error <= 3 * (m.unit - 1)), *m.mask)
    possible(*m.mask, m.inside, error == -(m.unit - 1))
    possible(*m.mask, m.inside, error == 3 * (m.unit - 1))


@pytest.mark.parametrize("f", SHIFTS)
def test_signed_truncation(f: int) -> None:
    """For -2^61 <= x <= 2^61 the result is within 2 units of x / 2^f, and never wraps.

    x enters as x + 2^61 and one unit is taken off afterwards: the result y has floor(x / 2^f) - 1 <= y <=
    floor(x / 2^f) + 2, and -(2 - 2^-f) <= y - x / 2^f <= 2 - 3 * 2^-f. The bounds are tight. Outside that
    range of x a wrong result exists, so the bound on |x| is needed.
    """
    m = Truncated(f)
    x = z3.Int("x")
    offset = LARGEST // 2
    enter = m.z == x + offset
    inside = z3.And(-offset <= x, x <= offset)
    y = m.result - (offset >> f) - 1
    prove(z3.And(x / m.unit - 1 <= y, y <= x / m.unit + 2), *m.mask, enter, inside)
    error = m.unit * y - x
    low, high = -(2 * m.unit - 1), 2 * m.unit - 3
    prove(z3.And(low <= error, error <= high), *m.mask, enter, inside)
    possible(*m.mask, enter, inside, error == low)
    possible(*m.mask, enter, inside, error == high)
    wrong = z3.Or(error < low, error > high)
    possible(*m.mask, m.z == (x + offset) % MODULUS, -MODULUS <= 2 * x, 2 * x < MODULUS, wrong)


@pytest.mark.parametrize("f", SHIFTS)
def test_unbiased_offset(f: int) -> None:
    """ops.truncate: entering x as x + 2^up - (2^f - 1) instead, nothing taken off afterwards, makes the error
    symmetric, for -2^up + 2^f <= x <= 2^62 - 2^up.

    Then |y - x / 2^f| <= 2 - 2^(1-f), attained on both sides; its mean is exactly 0 (test_identities).
    """
    m = Truncated(f)
    x = z3.Int("x")
    most = 2 * (m.unit - 1)
    for up in {max(f, 60), 61}:
        offset = 1 << up
        enter = m.z == x + offset - (m.unit - 1)
        inside = z3.And(-offset + m.unit - 1 <= x, x <= LARGEST - offset)
        error = m.unit * (m.result - (offset >> f)) - x
        prove(z3.And(-most <= error, error <= most), *m.mask, enter, inside)
        possible(*m.mask, enter, inside, error == most)
        possible(*m.mask, enter, inside, error == -most)


def test_square_of_a_truncated_value() -> None:
    """ops.truncate_rows: (a - base + b g)^2 = a^2 - 2 a base + base^2 + 2 b (a g - base g) modulo 2^64, for
    b = 2^(64-f) up to f = 32 and not beyond.
    """
    a, base, g = z3.Ints("a base g")
    for f in SHIFTS:
        b = MODULUS >> f
        off = (a - base + b * g) ** 2 - (a**2 - 2 * a * base + base**2 + 2 * b * (a * g - base * g))
        prove(off == b**2 * g**2)
        assert (b**2 % MODULUS == 0) == (2 * f <= N)


class Dropped:
    """x modulo 2^(low + width), raised by 3 (2^low - 1), as three components that lose `low` bits each."""

    def __init__(self, low: int, width: int) -> None:
        self.unit, self.ring = 1 << low, 1 << width
        whole = self.unit * self.ring
        self.slack = 3 * (self.unit - 1)
        self.x, *parts = z3.Ints("x x0 x1 x2")
        self.given = [z3.And(0 <= v, v < whole) for v in parts]
        self.given.append((sum(parts) - self.x - self.slack) % whole == 0)
        self.y = sum(v / self.unit for v in parts) % self.ring


DROPS = [(0, 20), (3, 4), (8, 24), (16, 28), (36, 28), (47, 17), (30, 9)]


@pytest.mark.parametrize(("low", "width"), DROPS)
def test_dropping_low_bits(low: int, width: int) -> None:
    """ops.drop of 0 <= x < 2^(low + width) - 3 (2^low - 1): 0 to 3 units of 2^low above the floor of x."""
    d = Dropped(low, width)
    inside = z3.And(d.x >= 0, d.x + d.slack < d.unit * d.ring)
    above = d.y - d.x / d.unit
    prove(z3.And(0 <= above, above <= (3 if low else 0)), *d.given, inside)
    if low:
        possible(*d.given, inside, above == 3)
        possible(*d.given, d.x < d.unit * d.ring, d.x + d.slack >= d.unit * d.ring, d.y == 0)


@pytest.mark.parametrize(("low", "width"), DROPS)
def test_sign_of_what_is_left(low: int, width: int) -> None:
    """A number that was dropped to `width` bits reads as negative only if it is, and always below
    -3 (2^low - 1); in between either may happen. It is one number, so comparisons of two such numbers agree.
    """
    d = Dropped(low, width)
    half = d.unit * d.ring // 2
    inside = z3.And(-half <= d.x, d.x + d.slack < half)
    negative = d.y >= d.ring // 2
    prove(z3.Not(negative), *d.given, inside, d.x >= 0)
    prove(negative, *d.given, inside, d.x < -d.slack)
    if low > 1:
        possible(*d.given, inside, d.x < -d.unit, negative, d.x >= -d.slack)
        possible(*d.given, inside, d.x < -d.unit, z3.Not(negative))


@pytest.mark.parametrize(("rest", "bits"), [(8, 8), (10, 6), (1, 3), (13, 5), (12, 6)])
def test_lookup_index(rest: int, bits: int) -> None:
    """A lookup reads piece j = (c_hi - u) mod 2^bits at remainder d = c_lo - v; 2^rest j + d is the value y.

    j is the piece of y, or one more with d negative. Below 2^(rest + bits) - 2^rest the index does not wrap
    around; from there on piece 0 may be read.
    """
    m = Masked(rest + bits)
    window, pieces = 1 << rest, 1 << bits
    mask = sum(m.r) % (window * pieces)
    u, v = mask / window, mask % window
    j, d = z3.Ints("j d")
    reads = z3.And(j == (m.c / window - u) % pieces, d == m.c % window - v)
    edge = window * pieces - window
    prove((window * j + d - m.z) % (window * pieces) == 0, *m.words, reads)
    prove(z3.And(-window < d, d < window), *m.words, reads)
    prove(window * j + d == m.z, *m.words, reads, m.z < edge)
    prove(z3.And(m.z / window <= j, j <= m.z / window + 1), *m.words, reads, m.z < edge)
    possible(*m.words, reads, m.z >= edge, j == 0)


# --- words ---------------------------------------------------------------------------------------------


def word(name: str, n: int = N) -> Any:
    return z3.BitVec(name, n)


def wide(x: Any, n: int) -> Any:
    return z3.ZeroExt(n - x.size(), x)


def bit(x: Any, i: int) -> Any:
    return z3.Extract(i, i, x)


def low_bits(x: Any, n: int) -> Any:
    return z3.Extract(n - 1, 0, x)


class CarrySave:
    """Three words, their carry-save pair, and their exact sum on two more bits."""

    def __init__(self, n: int) -> None:
        self.r = r = [word(f"r{i}", n) for i in range(3)]
        self.exact = wide(r[0], n + 2) + wide(r[1], n + 2) + wide(r[2], n + 2)
        self.sums = r[0] ^ r[1] ^ r[2]
        self.majority = ((r[0] ^ r[2]) & (r[1] ^ r[2])) ^ r[2]  # one AND a bit, as the batch computes it
        self.shifted = self.majority << 1


@pytest.mark.parametrize("n", [64, 48, 17, 3, 2])
def test_carry_save(n: int) -> None:
    """R = s + 2m exactly."""
    c = CarrySave(n)
    prove(c.exact == wide(c.sums, n + 2) + 2 * wide(c.majority, n + 2))
    pair = wide(c.sums, n + 1) + wide(c.shifted, n + 1)
    prove(low_bits(c.exact, n) == low_bits(pair, n))
    possible(bit(c.majority, n - 1) == 1, bit(pair, n) == 1)  # what passes 2^n may do so twice


@pytest.mark.parametrize(("n", "low"), [(64, 16), (24, 12), (18, 8), (12, 1)])
def test_carry_into_index(n: int, low: int) -> None:
    """prep lookup: the carries at bit low - 1 make sum(r_i mod 2^low) out of low bits of the sum, exactly."""
    c = CarrySave(n)
    parts = sum((wide(low_bits(r, low), low + 2) for r in c.r), z3.BitVecVal(0, low + 2))
    pair = wide(low_bits(c.sums, low), low + 1) + wide(low_bits(c.shifted, low), low + 1)
    carries = wide(bit(c.majority, low - 1), low + 2) + wide(bit(pair, low), low + 2)
    prove(parts - (carries << low) == wide(low_bits(c.exact, low), low + 2))


def _ports(a: Any, b: Any) -> tuple[list[Any], list[Any]]:
    """Propagate and generate bits of an addition."""
    return ([bit(a ^ b, i) for i in range(a.size())], [bit(a & b, i) for i in range(a.size())])


def _prefix_carries(p: Sequence[Any], g: Sequence[Any]) -> list[Any]:
    """Carries out of every bit, by the prefix network of Sklansky."""
    p, g = list(p), list(g)
    span = 1
    while span < len(p):
        old_p, old_g = p[:], g[:]
        for hi in range(len(p)):
            if hi & span:
                lo = (hi & ~(2 * span - 1)) + span - 1
                g[hi] = old_g[hi] ^ (old_p[hi] & old_g[lo])
                p[hi] = old_p[hi] & old_p[lo]
        span *= 2
    return g


@pytest.mark.parametrize("n", [64, 63, 40, 18, 7, 2])
def test_adder(n: int) -> None:
    """The adder of prep adds: every carry of the prefix network.

    XOR replaces OR in joining two spans because a span never both generates and propagates.
    """
    a, b = word("a", n), word("b", n)
    total = wide(a, n + 1) + wide(b, n + 1)
    p, g = _ports(a, b)
    carries = _prefix_carries(p, g)
    into = [z3.BitVecVal(0, 1), *carries[:-1]]
    prove(z3.Concat(*[p[i] ^ into[i] for i in reversed(range(n))]) == a + b)
    prove(carries[-1] == bit(total, n))


@pytest.mark.parametrize("f", [1, 12, 16, 20, 32, 61])
def test_truncation_on_words(f: int) -> None:
    """Truncation as words, in two lemmas: the sum without u is c - 2^62 u + 2^64 [u > c >> 62], also shifted
    by f; and quotients take components one by one.

    For any X, floor((X + v) / 2^f) = floor((X + (v mod 2^f)) / 2^f) + (v >> f). Used for each component in
    turn on x and those before, it gives the formula.
    """
    room = N + 2
    x, u, v = word("x"), word("u", 2), [word(f"v{i}", N - 2) for i in range(3)]
    below = wide(x, room) + sum((wide(each, room) for each in v), z3.BitVecVal(0, room))
    whole = low_bits(below, N)
    c = whole + (wide(u, N) << (N - 2))
    carry = z3.If(z3.UGT(u, z3.Extract(N - 1, N - 2, c)), z3.BitVecVal(1, N), z3.BitVecVal(0, N))
    inside = z3.ULE(x, LARGEST)
    prove(below == wide(whole, room), inside)
    prove(below == wide(c, room) - (wide(u, room) << (N - 2)) + (wide(carry, room) << N), inside)
    prove(z3.LShR(whole, f) == z3.LShR(c, f) - (wide(u, N) << (N - 2 - f)) + (carry << (N - f)), inside)

    any_value, one = word("X", room), wide(v[0], room)
    rest = one & ((1 << f) - 1)
    fits = z3.ULT(any_value, 3 << N)
    prove(z3.LShR(any_value + one, f) == z3.LShR(any_value + rest, f) + z3.LShR(one, f), fits)


@pytest.mark.parametrize("n", [64, 48, 32, 17, 2])
def test_sign_by_masked_opening(n: int) -> None:
    """sign(c - r) = top(c) ^ top(r) ^ [c mod 2^(n-1) < r mod 2^(n-1)], for all c and r."""
    c, r = word("c", n), word("r", n)
    less = z3.If(z3.ULT(low_bits(c, n - 1), low_bits(r, n - 1)), z3.BitVecVal(1, 1), z3.BitVecVal(0, 1))
    prove(bit(c, n - 1) ^ bit(r, n - 1) ^ less == bit(c - r, n - 1))


@pytest.mark.parametrize("sizes", [(5, 5, 5, 4, 4, 4), (5, 4), (9,) * 7, (3, 1), (6,)])
def test_at_most_by_digits(sizes: tuple[int, ...]) -> None:
    """r <= k as ops._at_most adds it up: the highest digit is less, or those above are equal and the next is
    less, and so on; the lowest may be equal. At most one of these cases holds, so their sum over GF(2) does.
    """
    n = sum(sizes)
    k, r = word("k", n), word("r", n)
    parts, at = [], 0
    for size in sizes:
        parts.append(tuple(z3.Extract(at + size - 1, at, x) for x in (r, k)))
        at += size
    equal = [_bit(a == b) for a, b in parts]
    less = [_bit(z3.ULE(a, b) if i == 0 else z3.ULT(a, b)) for i, (a, b) in enumerate(parts)]
    total = less[-1]
    for i in reversed(range(len(sizes) - 1)):
        case = less[i]
        for above in equal[i + 1 :]:
            case = case & above
        total = total ^ case
    prove((total == 1) == z3.ULE(r, k))


def _bit(fact: Any) -> Any:
    return z3.If(fact, z3.BitVecVal(1, 1), z3.BitVecVal(0, 1))


@pytest.mark.parametrize(("b", "k"), [(8, 10), (12, 8), (40, 8), (24, 40), (52, 12), (1, 1)])
def test_windows(b: int, k: int) -> None:
    """c = z + r modulo 2^(b+k), r = 2^b u + v: z = 2^b j + d with j = (c_hi - u) mod 2^k and d = c_lo - v.

    -2^b < d < 2^b, and j is the upper part of z, plus one (modulo 2^k) exactly if d is negative. So a table
    indexed by j meets remainders of both signs, and piece 0 also continues the last piece from above.
    """
    n = b + k
    z, r = word("z", n), word("r", n)
    c = z + r
    j = z3.Extract(n - 1, b, c) - z3.Extract(n - 1, b, r)
    c_lo, v = low_bits(c, b), low_bits(r, b)
    d = wide(c_lo, n + 1) - wide(v, n + 1)  # one bit more than the ring, so that its sign can be read
    prove(z == (wide(j, n) << b) + low_bits(d, n))
    prove(z3.And(d > -(1 << b), d < 1 << b))
    negative = z3.If(d < 0, z3.BitVecVal(1, k), z3.BitVecVal(0, k))
    prove(j == z3.Extract(n - 1, b, z) + negative)
    possible(j == 0, z3.Extract(n - 1, b, z) == (1 << k) - 1)


def test_xor_in_the_ring() -> None:
    """b0 + b1 - 2 b0 b1, applied twice, is the XOR of three bits modulo 2^64; m (1 - 2c) + c is m ^ c."""
    b = [word(f"b{i}") for i in range(3)]
    bits = [z3.ULE(x, 1) for x in b]
    two = b[0] + b[1] - 2 * b[0] * b[1]
    prove(two == b[0] ^ b[1], *bits)
    prove(two + b[2] - 2 * two * b[2] == b[0] ^ b[1] ^ b[2], *bits)
    prove(b[0] * (1 - 2 * b[1]) + b[1] == b[0] ^ b[1], *bits)


def test_low_bit_of_a_sum() -> None:
    """The low bits of the components of a sum share its low bit over GF(2): a free check of an injection."""
    x = [word(f"x{i}") for i in range(3)]
    prove(bit(x[0] + x[1] + x[2], 0) == bit(x[0], 0) ^ bit(x[1], 0) ^ bit(x[2], 0))


@pytest.mark.parametrize("width", [32, 21, 8, 1])
def test_open_low(width: int) -> None:
    """Opening x * 2^(64-width) and shifting back yields x mod 2^width, and depends on nothing above."""
    x, y = word("x"), word("y")
    up = N - width
    prove(z3.LShR(x << up, up) == x & ((1 << width) - 1))
    prove((x << up) == (y << up), low_bits(x, width) == low_bits(y, width))
