"""What a party says of its own code: a digest of what is installed, for a register that it may reset itself.

PCR 16 is for such statements: every locality may reset it. So its value is the word of whoever runs on the
machine, signed by the machine's key. It makes honest differences visible, of version and of configuration; it
is no proof against an operator, nor against a process that took the machine over. What an operator cannot
choose are the registers of the boot (0 to 15), where the image that holds the code must be measured.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mimir.errors import LocalError

CODE_PCR = 16
PACKAGES = ("mimir", "wg")
# What the interpreter runs from a package's folder. Bytecode caches are left out: they are made on the spot.
_SUFFIXES = tuple(importlib.machinery.SOURCE_SUFFIXES + importlib.machinery.EXTENSION_SUFFIXES)


def code_digest(roots: Mapping[str, Path] | None = None) -> bytes:
    """SHA-256 over every module of `mimir` and `wg` that is installed here, compiled kernels included: for
    each in the order of names, its name and the hash of its content. Equal installations give equal digests
    wherever they lie; kernels that another compiler made differ. Interpreter, libraries and bytecode caches
    are not in it. `roots` are other folders of the packages, by name."""
    whole = hashlib.sha256(b"mimir code\0")
    for package, root in sorted((roots or {each: _folder(each) for each in PACKAGES}).items()):
        modules = list(_modules(root))
        if not modules:
            raise LocalError(f"{root}: no module of {package} to be measured")
        for name, path in modules:
            whole.update(f"{package}/{name}\0".encode())
            whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.digest()


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise LocalError(f"the package {package} has no folder to be measured")
    return Path(found.submodule_search_locations[0])


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    listed = []
    for folder, inner, files in os.walk(root):
        inner[:] = [each for each in inner if each != "__pycache__"]
        listed += [Path(folder, each) for each in files if each.endswith(_SUFFIXES)]
    yield from sorted((path.relative_to(root).as_posix(), path) for path in listed)


def statements(code: bytes, config: bytes) -> tuple[bytes, bytes]:
    """By what PCR 16 is extended, in this order: the code's digest, then that of the configuration."""
    return (
        hashlib.sha256(b"mimir measures code\0" + code).digest(),
        hashlib.sha256(b"mimir measures config\0" + config).digest(),
    )


def code_pcr(code: bytes, config: bytes) -> bytes:
    """The value of PCR 16, reset and then extended by both statements: what a policy names."""
    value = bytes(32)
    for each in statements(code, config):
        value = hashlib.sha256(value + each).digest()
    return value
