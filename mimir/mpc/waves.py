"""Exponentials, real and imaginary, of components of masks: e^(c - r) = e^c e^-r, and e^-r is the product of
one factor for each component of r.

The two holders of a component compute its factor by themselves, and must get the same integer on any
machine: so functions are polynomials in double precision, evaluated by additions and multiplications alone,
which IEEE 754 makes exact to the bit, and rounded. No branch and no index depends on a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from math import factorial, pi
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mimir.mpc.domain import Ring

Real = npt.NDArray[np.floating[Any]]

_TURN: Final = (2 * pi) ** 2
# Of cos(2 pi u) and sin(2 pi u) / u in u^2, |u| <= 1/2, to within 4e-9: the highest power first.
_COS: Final = [(-1) ** k * _TURN**k / factorial(2 * k) for k in range(9, -1, -1)]
_SIN: Final = [(-1) ** k * 2 * pi * _TURN**k / factorial(2 * k + 1) for k in range(9, -1, -1)]
CIRCLE: Final = np.array([_COS, _SIN])
EXP: Final = np.array([1 / factorial(k) for k in range(13, -1, -1)])  # of e^y, |y| <= 1.3, to within 1e-9


def _polynomial(coefficients: Sequence[float] | Real, x: Real) -> Real:
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y *= x
        y += c
    return y


def circle(turns: Real) -> tuple[Real, Real]:
    """cos and sin of 2 pi t for t in [0, 1]."""
    u = turns - 0.5
    square = u * u
    return -_polynomial(_COS, square), -u * _polynomial(_SIN, square)


def exponential(y: Real) -> Real:
    """e^y for |y| <= 1.3."""
    return _polynomial(EXP, y)


def integers(x: Real, scale: int | npt.NDArray[np.int64]) -> Ring:
    """x at this scale, or at one for each column, rounded to the nearest integer, as ring elements."""
    return np.rint(x * np.ldexp(1.0, scale)).astype(np.int64).view(np.uint64)


def fractions(r: Ring, turns: Sequence[int], bits: int) -> Real:
    """k r / 2^bits modulo 1 for each k of `turns`: (n, turns), exact. r is a component of a mask modulo
    2^bits, or an opened value.
    """
    whole = r[:, None] * np.array(turns, np.uint64) & np.uint64((1 << bits) - 1)
    return whole.astype(np.float64) * 2.0**-bits


@lru_cache(maxsize=64)
def power(exponent: float) -> float:
    """e^exponent, correctly rounded, so that all machines agree."""
    return float(Decimal(exponent).exp())
