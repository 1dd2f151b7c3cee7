"""What this host lacks to be a party or a client, and how to get it on a Debian-like system.

Each check answers one `Finding`. It changes nothing, opens no connection, and imports only what it must, so
that it works on a host where much is missing.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.metadata
import json
import os
import re
import resource
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mimir.config import Address, Attester, Config, load
from mimir.errors import BadInput, EnvironmentMissing, MimirError
from wg.uapi import SOCKET_DIRECTORY

OLDEST_PYTHON = (3, 11)
CAP_NET_ADMIN = 12
WANTED_MEMORY = 1 << 30  # bytes free for one party
WANTED_DISK = 2 << 30  # bytes free for model shares
TIMEX_BYTES = 256  # more than the kernel's struct timex
TIME_ERROR = 5  # adjtimex: the clock is not synchronised

Need = Literal["needed", "better"]


@dataclass(frozen=True)
class Finding:
    """One thing about this host. `remedy` says how to get it when it is not fine."""

    name: str
    fine: bool
    need: Need
    what: str
    remedy: str = ""


def report(config_file: str | None, role: str, as_json: bool) -> int:
    """Print the findings; returns 5 if something that is needed is missing."""
    config = load(config_file) if config_file is not None else None
    findings = list(examine(config, role))
    missing = [each for each in findings if not each.fine and each.need == "needed"]
    if as_json:
        print(json.dumps({"fine": not missing, "findings": [asdict(each) for each in findings]}, indent=2))
    else:
        width = max(len(each.name) for each in findings)
        for each in findings:
            mark = "ok     " if each.fine else "MISSING" if each.need == "needed" else "better "
            print(f"{mark} {each.name.ljust(width)}  {each.what}")
            if not each.fine:
                print(f"        {''.ljust(width)}  -> {each.remedy}")
        print()
        print(
            f"{len(missing)} of {len(findings)} missing: this host cannot be a {role} yet"
            if missing
            else f"nothing that a {role} needs is missing"
        )
    return EnvironmentMissing.exit_code if missing else 0


def examine(config: Config | None, role: str) -> Iterator[Finding]:
    """All findings for a role; with a configuration, also what that one needs."""
    checks: list[Callable[[], Iterator[Finding]]] = [_python, _packages, lambda: _kernels(role), _clock]
    if role == "party":
        checks += [_memory, _secrecy]
        if config is None or config.confinement.mode == "enforce":
            checks.append(_confinement)
        if config is None or config.tunnel.mode == "wireguard":
            checks += [_privilege, _wireguard]
            if config is None or config.tunnel.rotates:
                checks.append(_exchange)
        if config is not None:
            checks += [lambda: _files(config), lambda: _ports(config)]
            if config.attester is not None:
                settings = config.attester
                checks.append(lambda: _attester(settings))
    for check in checks:
        yield from check()


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(
        "python",
        sys.version_info[:2] >= OLDEST_PYTHON,
        "needed",
        f"Python {version}",
        "apt install python3.11 python3.11-venv   (Debian 12 has it)",
    )


def _packages() -> Iterator[Finding]:
    try:
        wanted = importlib.metadata.requires("mimir") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "packages", False, "needed", "Mimir is not installed here", "pip install . in its directory"
        )
        return
    absent = []
    for line in wanted:
        if "extra ==" in line:
            continue
        match = re.match(r"[A-Za-z0-9._-]+", line)
        assert match is not None
        try:
            importlib.metadata.version(match.group())
        except importlib.metadata.PackageNotFoundError:
            absent.append(match.group())
    what = f"absent: {', '.join(absent)}" if absent else "all installed"
    yield Finding("packages", not absent, "needed", what, f"pip install {' '.join(absent)}")


def _kernels(role: str) -> Iterator[Finding]:
    """The C kernels are needed by parties and owners; a client that only asks does without."""
    need: Need = "needed" if role == "party" else "better"
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    try:
        from mimir import kernels

        level, available = kernels.level(), kernels.available()
    except (MimirError, ImportError) as error:
        yield Finding(
            "compiler",
            compiler is not None,
            need,
            f"C compiler: {compiler or 'none found'}",
            "apt install gcc libc6-dev python3-dev",
        )
        yield Finding("kernels", False, need, f"C kernels: {error}", "python -m mimir.kernels.build")
        return
    yield Finding("kernels", True, need, f"C kernels compiled, level {level} of {', '.join(available)}")
    yield Finding(
        "processor",
        "avx2" in available,
        "better",
        f"best level here: {available[-1]}",
        "a processor with AVX2 and AES instructions makes a party several times faster",
    )


def _clock() -> Iterator[Finding]:
    buffer = ctypes.create_string_buffer(TIMEX_BYTES)
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        state = -1
    yield Finding(
        "clock",
        state not in (-1, TIME_ERROR),
        "better",
        "clock synchronised" if state not in (-1, TIME_ERROR) else "clock not known to be synchronised",
        "apt install systemd-timesyncd   (WireGuard refuses a peer whose clock steps back)",
    )


def _memory() -> Iterator[Finding]:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    free = int(match.group(1)) * 1024 if match else 0
    yield Finding(
        "memory",
        free >= WANTED_MEMORY,
        "better",
        f"{free / 1e9:.1f} GB available",
        f"{WANTED_MEMORY / 1e9:.1f} GB is what a party with a model of 15 million weights takes",
    )


def _secrecy() -> Iterator[Finding]:
    swaps = _read("/proc/swaps").splitlines()[1:]
    yield Finding(
        "swap",
        not swaps,
        "better",
        f"{len(swaps)} swap areas" if swaps else "no swap",
        "swapoff -a, or encrypted swap: keys and shares are in memory and must not reach a disk in clear",
    )
    soft, _hard = resource.getrlimit(resource.RLIMIT_CORE)
    pattern = _read("/proc/sys/kernel/core_pattern").strip()
    # A party sets its own limit to 0; a handler that is a program is run all the same.
    yield Finding(
        "core dumps",
        not pattern.startswith("|"),
        "better",
        f"core dumps go to a program: {pattern.split()[0]}" if pattern.startswith("|") else f"limit {soft}",
        "systemctl disable --now the handler, or sysctl kernel.core_pattern=core: a dump contains keys",
    )


def _privilege() -> Iterator[Finding]:
    match = re.search(r"^CapEff:\s+([0-9a-f]+)", _read("/proc/self/status"), re.MULTILINE)
    able = bool(match and int(match.group(1), 16) >> CAP_NET_ADMIN & 1)
    yield Finding(
        "privilege",
        able,
        "needed",
        f"CAP_NET_ADMIN {'held' if able else 'not held'} (user {os.geteuid()})",
        "run the party as root, or: setpriv --ambient-caps +net_admin --inh-caps +net_admin ...; "
        'or AmbientCapabilities=CAP_NET_ADMIN in its systemd unit; tests may use tunnel.mode = "none"',
    )


def _confinement() -> Iterator[Finding]:
    from mimir import confine

    version = confine.landlock_version()
    yield Finding(
        "landlock",
        version >= confine.OLDEST_LANDLOCK,
        "needed",
        f"Landlock {version}" if version else "no Landlock",
        'Linux 5.19 with landlock after lsm= at boot; or confinement.mode = "off"',
    )
    able = confine.can_filter()
    yield Finding(
        "seccomp",
        able,
        "needed",
        f"a filter of system calls {'can' if able else 'cannot'} be made for {os.uname().machine}",
        'apt install libseccomp2; or confinement.mode = "off"',
    )
    sockets = Path(SOCKET_DIRECTORY)
    if os.geteuid() != 0:
        able = sockets.is_dir() and os.access(sockets, os.W_OK)
        yield Finding(
            "sockets",
            able,
            "better",
            f"{sockets}: {'usable' if able else 'not writable'}",
            f"install -d -m 0700 -o USER {sockets}, which wireguard-go needs; or RuntimeDirectory=wireguard",
        )


def _exchange() -> Iterator[Finding]:
    """The post-quantum half of the exchange that renews tunnel keys."""
    from wg.errors import NotPossibleHere
    from wg.exchange import HybridExchange

    try:
        HybridExchange().offer()
        able = True
    except NotPossibleHere:
        able = False
    yield Finding(
        "ml-kem",
        able,
        "needed",
        f"the Python package cryptography {'has' if able else 'lacks'} ML-KEM-768, which renewing keys needs",
        "pip install 'cryptography>=48', whose wheels have it; or tunnel.rotate_seconds = 0 at all parties",
    )


def _wireguard() -> Iterator[Finding]:
    if _has_kernel_wireguard():
        yield Finding("wireguard", True, "needed", "WireGuard in the kernel")
        return
    from wg.device import find_userspace

    program = find_userspace()
    yield Finding(
        "wireguard",
        program is not None,
        "needed",
        "no WireGuard in the kernel; "
        + (f"{program.path} {'.'.join(map(str, program.version))}" if program else "no wireguard-go either"),
        "apt install -t bookworm-backports wireguard-go   (or a kernel with CONFIG_WIREGUARD)",
    )
    if program is None:
        return
    yield Finding(
        "wireguard-go",
        not program.slow,
        "better",
        f"version of {program.version[-1]}" if program.version[-1] else "unknown version",
        "apt install -t bookworm-backports wireguard-go   (2023 or newer carries several times more)",
    )
    tun = Path("/dev/net/tun")
    try:
        os.close(os.open(tun, os.O_RDWR | os.O_CLOEXEC))
        problem = None
    except OSError as error:
        problem = error
    yield Finding(
        "tun",
        problem is None,
        "needed",
        "/dev/net/tun usable" if problem is None else f"/dev/net/tun: {problem.strerror}",
        "modprobe tun; in a container: --device /dev/net/tun --cap-add NET_ADMIN"
        if problem is None or problem.errno != errno.EACCES
        else "run as root, or give this user access to /dev/net/tun",
    )


def _has_kernel_wireguard() -> bool:
    """Loaded, built in, or a module that can be loaded."""
    if Path("/sys/module/wireguard").exists():
        return True
    modules = Path("/lib/modules") / os.uname().release
    for index in ("modules.builtin", "modules.dep"):
        if re.search(r"/wireguard\.ko", _read(modules / index)):
            return True
    return False


def _files(config: Config) -> Iterator[Finding]:
    import trio

    from mimir import keys
    from mimir.net.identity import Identity, is_sealed

    key = None
    if config.keys.source in ("file", "tpm"):  # the others are elsewhere, and nobody is asked here
        try:
            source = keys.open_source(config.keys, config.attester)
            key = trio.run(source.obtain)
            yield Finding("storage key", True, "needed", source.protection)
        except MimirError as error:
            remedy = f"mimir keygen --kind storage --sealed-by {config.source}"
            yield Finding("storage key", False, "needed", str(error), remedy)
    try:
        if key is None and is_sealed(config.identity_key):
            raise BadInput(f"{config.identity_key}: encrypted, and no storage key to open it here")
        identity = Identity.load(config.identity_key, key)
        kept = "encrypted" if is_sealed(config.identity_key) else "readable, owner-only"
        ours = identity.public_hex == config.me.identity
        yield Finding(
            "identity",
            ours,
            "needed",
            f"{config.identity_key}: {kept if ours else 'not the key of this party'}",
            f"peers[{config.party}].identity must be {identity.public_hex} in all three files",
        )
    except MimirError as error:
        yield Finding("identity", False, "needed", str(error), f"mimir keygen --out {config.identity_key}")
    if config.tunnel.private_key is not None:
        from wg import KeyFileError, load_private

        try:
            load_private(config.tunnel.private_key).wipe()
            yield Finding("tunnel key", True, "needed", f"{config.tunnel.private_key}: readable, owner-only")
        except KeyFileError as error:
            remedy = f"mimir keygen --kind tunnel --out {config.tunnel.private_key}"
            yield Finding("tunnel key", False, "needed", str(error), remedy)
    place = config.data_dir
    while not place.exists():
        place = place.parent
    loose = place == config.data_dir and bool(place.stat().st_mode & 0o077)
    writable = os.access(place, os.W_OK)
    yield Finding(
        "data_dir",
        writable and not loose,
        "needed",
        f"{config.data_dir}: {'open to others' if loose else 'usable' if writable else 'not writable'}",
        f"chmod 700 {config.data_dir}" if loose else f"give this user write access to {place}",
    )
    free = shutil.disk_usage(place).free
    yield Finding(
        "disk",
        free >= WANTED_DISK,
        "better",
        f"{free / 1e9:.1f} GB free at {place}",
        "a party stores 16 bytes per weight of each model",
    )


def _attester(settings: Attester) -> Iterator[Finding]:
    """Whether what makes evidence is there and may be used. It is not asked for anything."""
    place, kind = settings.place, settings.kind
    remedies = {
        "snp": "a guest of AMD SEV-SNP with Linux 6.7, CONFIG_TSM_REPORTS and sev-guest: modprobe sev-guest; "
        "mount -t configfs none /sys/kernel/config",
        "tdx": "a guest of Intel TDX with Linux 6.7, CONFIG_TSM_REPORTS and tdx-guest: modprobe tdx-guest; "
        "mount -t configfs none /sys/kernel/config",
        "nitro": "a Nitro enclave: /dev/nsm exists nowhere else",
        "tpm": "modprobe tpm_crb or tpm_tis; add this user to the group of the device (Debian: tss)",
        "swtpm": "scripts/setup --attester --packages; scripts/software_tpm DIR makes the device DIR/socket",
    }
    if isinstance(place, Address):
        what, fine = "an address, which is not tried", True
    else:
        try:
            mode = place.stat().st_mode
            wanted = {
                "snp": stat.S_ISDIR(mode),
                "tdx": stat.S_ISDIR(mode),
                "swtpm": stat.S_ISSOCK(mode) or stat.S_ISCHR(mode),
            }.get(kind, stat.S_ISCHR(mode))
            fine = wanted and os.access(place, os.R_OK | os.W_OK)
            what = "usable" if fine else "no access for this user" if wanted else "something else"
        except OSError as error:
            what, fine = error.strerror or str(error), False
    yield Finding("attester", fine, "needed", f"{kind} at {place}: {what}", remedies[kind])


def _ports(config: Config) -> Iterator[Finding]:
    for name, listen in (("control", config.control.listen), ("mesh", config.mesh.listen)):
        if name == "mesh" and config.tunnel.mode == "wireguard":
            continue  # its address exists only once the tunnel is up
        problem = _cannot_listen(listen)
        yield Finding(
            f"{name} port",
            problem is None,
            "needed",
            f"{listen}: {problem or 'free'}",
            f"stop what listens there, or change {name}.listen",
        )


def _cannot_listen(listen: Address) -> str | None:
    try:
        family = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(family[4])
    except OSError as error:
        return error.strerror or str(error)
    return None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
