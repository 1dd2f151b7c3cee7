"""Replicated sharing among three parties, one of whom may be malicious: the backend's local half.

x = x_0 + x_1 + x_2; P_i holds (x_i, x_{i+1}), so component i is known to P_i and P_{i-1}, who also share the
key K_i from which random components are expanded (Araki et al., CCS 2016). A product of two shares is an
additive share per party, masked by a share of zero and passed on to P_{i-1} (doors.reshare). A malicious
party can only add an error of its choice to a product; `check` finds it.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mimir import kernels
from mimir.errors import LocalError
from mimir.mpc.domain import Ring
from mimir.secret import Secret

PARTIES: Final = 3


class Replicated:
    """Keys and counters of one lane of one session at one party.

    Every expansion takes a fresh stream number; both holders of a key draw in the same order, so the
    numbers agree without a message. A number is never used twice under one key.
    """

    components: Final = 2

    def __init__(self, party: int, key_mine: Secret, key_next: Secret) -> None:
        self.party = party
        self._mine = key_mine  # K_i, shared with P_{i-1}
        self._next = key_next  # K_{i+1}, shared with P_{i+1}
        self._stream = 0
        self._takes = {0: 0, 2: 1}.get(party)  # which of our components takes public values
        self.one = np.array([i == self._takes for i in range(2)], np.uint64)
        self._wiped = False

    @property
    def previous(self) -> int:
        return (self.party - 1) % PARTIES

    @property
    def following(self) -> int:
        return (self.party + 1) % PARTIES

    def _expand(self, out: Ring) -> None:
        if self._wiped:
            raise LocalError("the keys of this session have been wiped")
        self._stream += 1
        with self._mine.reveal_to_kernel() as k:
            kernels.prg(k, self._stream, out[0])
        with self._next.reveal_to_kernel() as k:
            kernels.prg(k, self._stream, out[1])

    def random(self, *shape: int) -> Ring:
        """Components (2, *shape) of a uniform secret nobody knows. No message."""
        out = np.empty((2, *shape), np.uint64)
        self._expand(out)
        return out

    def zero(self, *shape: int) -> Ring:
        """This party's summand of a fresh additive sharing of zero. No message."""
        zero, other = self.random(*shape)
        zero -= other
        return zero

    def zero_bits(self, *shape: int) -> Ring:
        """The same over GF(2)."""
        zero, other = self.random(*shape)
        zero ^= other
        return zero

    def add_public(self, v: Ring, public: Ring | np.uint64) -> Ring:
        """Component 0 takes the public value: slot 0 at P_0, slot 1 at P_2."""
        out = v.copy()
        if self._takes is not None:
            part = out[self._takes, ...]
            part += public
        return out

    def xor_public(self, v: Ring, public: Ring | np.uint64) -> Ring:
        out = v.copy()
        if self._takes is not None:
            part = out[self._takes, ...]
            part ^= public
        return out

    def known(self, component: int, v: Ring) -> Ring:
        """From components (2, ...) of a random value keep one: a value that its two holders know."""
        out = np.zeros_like(v)
        for slot in range(2):
            if (self.party + slot) % PARTIES == component:
                out[slot] = v[slot]
        return out

    def wipe(self) -> None:
        """Forget the keys; later expansions fail."""
        self._wiped = True
        self._mine.wipe()
        self._next.wipe()
