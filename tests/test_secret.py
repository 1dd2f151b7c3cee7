"""A Secret must not leak by any of Python's usual accidents, and must be zero afterwards."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from mimir.errors import LocalError
from mimir.secret import CoinSeed, IdentityKey, PairwiseKey, Secret

ACCIDENTS: dict[str, Callable[[Secret], object]] = {
    "truth": bool,
    "equal": lambda s: s == s,
    "unequal": lambda s: s != b"x",
    "hash": hash,
    "iterate": list,
    "contain": lambda s: 1 in s,  # type: ignore[operator]
    "index": lambda s: s[0],
    "length": len,  # type: ignore[dict-item]
    "format": lambda s: f"{s}",
    "bytes": bytes,  # type: ignore[dict-item]
    "array": lambda s: np.asarray(s),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "pickle 5": lambda s: pickle.dumps(s, protocol=5),
    "reduce": lambda s: s.__reduce_ex__(2),
    "dict key": lambda s: {s: 1},
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_accidents_raise_and_do_not_show_the_value(accident: str) -> None:
    secret = PairwiseKey(bytearray(b"\x5a" * 32))
    with pytest.raises(LocalError) as caught:
        ACCIDENTS[accident](secret)
    assert "Z" * 4 not in str(caught.value) and "5a5a" not in str(caught.value)


def test_text_shows_type_and_size_only() -> None:
    secret = CoinSeed(b"\x5a" * 48)
    for text in (repr(secret), str(secret), "%s" % secret):  # noqa: UP031 - the old way must be safe too
        assert text == "<CoinSeed: 48 bytes>"


def test_the_memory_is_taken_over_and_wiped() -> None:
    memory = bytearray(b"\x5a" * 32)
    with Secret(memory) as secret, secret.reveal_to_kernel() as view:
        assert bytes(view) == b"\x5a" * 32 and view.readonly
    assert memory == bytearray(32)
    assert secret.size == 0 and repr(secret) == "<Secret: wiped>"
    with pytest.raises(LocalError, match="wiped"), secret.reveal_to_kernel():
        pass


def test_a_view_dies_with_its_block_and_wiping_reaches_a_lent_view() -> None:
    secret = Secret(bytearray(b"\x5a" * 8))
    with secret.reveal_to_kernel() as view:
        secret.wipe()
        assert bytes(view) == bytes(8)
    with pytest.raises(ValueError):
        bytes(view)


def test_it_wipes_when_forgotten() -> None:
    memory = bytearray(b"\x5a" * 8)
    secret = Secret(memory)
    del secret
    assert memory == bytearray(8)


def test_kinds_check_their_size() -> None:
    with pytest.raises(LocalError, match="32 needed"):
        IdentityKey(b"short")
    with pytest.raises(LocalError, match="empty"):
        Secret(b"")
    assert IdentityKey.random().size == 32


def test_slots_are_reused_but_never_while_somebody_looks() -> None:
    first = Secret(bytearray(b"\x5a" * 40))
    with first.reveal_to_kernel() as view:
        first.wipe()
        others = [Secret(b"\xa5" * 40) for _ in range(2000)]
        assert bytes(view) == bytes(40), "another secret in a slot that is still lent"
    del others
    again = [Secret(b"\xa5" * 40) for _ in range(2000)]
    assert all(secret.size == 40 for secret in again)


PROBE = """
import atexit, ctypes, re, resource, sys
limit = {limit}
if limit is not None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
seen = []
atexit.register(lambda: print("left", any(ctypes.string_at(*seen[0]))))  # runs after that of mimir.secret
from mimir.secret import Pages, Secret, lock_state, require_locked
secret = Secret(bytearray(b"\\x5a" * 32))
with secret.reveal_to_kernel() as view:
    address = ctypes.addressof((ctypes.c_char * 32).from_buffer(secret._memory))
seen.append((address, 32))
print("state", lock_state())
try:
    require_locked()
    print("required")
except Exception as error:
    print("required", error)
flags, inside = "", False
for line in open("/proc/self/smaps"):
    found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
    if found:
        inside = int(found[1], 16) <= address < int(found[2], 16)
    elif inside and line.startswith("VmFlags:"):
        flags = line
print("flags", flags.strip())
try:
    Pages(1 << 20, lock=True)
    print("pages locked")
except Exception as error:
    print("pages", error)
"""


def probe(limit: int | None, *, privileged: bool) -> str:
    """Run the probe, without the right to lock as much as it likes unless `privileged`."""
    command = [sys.executable, "-c", PROBE.format(limit=limit)]
    if not privileged and os.geteuid() == 0:
        command = ["setpriv", "--bounding-set", "-ipc_lock,-sys_resource", *command]
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv, or a user who is not root")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_secrets_are_locked_left_out_of_core_dumps_and_gone_at_exit() -> None:
    said = probe(None, privileged=True)
    flags = next(line for line in said.split("\n") if line.startswith("flags")).split()
    assert "dd" in flags, "not in core dumps"
    assert "left False" in said, "wiped at exit"
    if "state None" in said:
        assert "lo" in flags, "locked"
    else:
        assert "ulimit -l" in said  # a machine that allows not even 64 KiB


def test_a_limit_that_allows_no_locking_is_told_with_the_remedy() -> None:
    said = probe(0, privileged=False)
    assert "RLIMIT_MEMLOCK is 0 KiB; raise it (LimitMEMLOCK=, `ulimit -l`)" in said
    assert "required keys could go to swap: " in said
    assert "pages 1048576 bytes cannot be locked in memory" in said
    assert "left False" in said


def test_wiping_in_a_child_leaves_the_parent_s_alone() -> None:
    secret = Secret(bytearray(b"\x5a" * 32))
    child = os.fork()
    if child == 0:
        secret.wipe()
        os._exit(0)
    os.waitpid(child, 0)
    with secret.reveal_to_kernel() as view:
        assert bytes(view) == b"\x5a" * 32
