"""What a party gives up once it has read its file: a break into this process gains as little as can be.

`confine(config)` binds the calling thread and every thread and process that it starts later, so it has to be
called while there is one thread. From then on, until the process and its children end:

- no new privileges (`execve` gives none), no core dumps, no reading of its memory by others of its user, no
  memory that is writable and executable;
- no capability but CAP_NET_ADMIN, and that one only for a tunnel;
- a file or a program only if `rights` names it, a TCP port only if `ports` does (Landlock);
- a system call only if `CALLS` or `_conditions` name it (seccomp).

What passes is a list in each case; what is not on it fails. A refused call gets EPERM. `ABSENT` gets ENOSYS,
the answer of an older kernel, for which C libraries have another way (`clone3` takes its flags by pointer,
where no filter sees them; `clone` does not). `FATAL` ends the process at once: no part of a party, of its
libraries or of wireguard-go ever tries one of these, so whoever does is no party any more, and should not get
a second try.

The BPF program is made by libseccomp, which knows every architecture's numbers; it is called through ctypes,
since its Python bindings come with distributions only and `pyseccomp` has had no release since 2021.
Landlock and capabilities are a few calls of the kernel's own, with the numbers of its headers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import site
import struct
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import mimir
import wg
from mimir.config import Address, Config
from mimir.errors import BadInput, ConfigError, EnvironmentMissing, LocalError
from wg.device import locate_userspace
from wg.generations import CONTROL_PORT
from wg.uapi import SOCKET_DIRECTORY

OFF = 'or confinement.mode = "off", which leaves a party that is broken into with all that its user may do'

# --- Landlock: linux/landlock.h ----------------------------------------------------------------------------

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_SOCK = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 9
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
#: Rights that make sense on a file; the others are for directories.
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
READ = READ_FILE | READ_DIR
WRITE = WRITE_FILE | TRUNCATE
#: A directory of ours: everything but special files, links and programs.
KEEP = READ | WRITE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | REFER
BIND_TCP, CONNECT_TCP = 1 << 0, 1 << 1
_SCOPES = 1 << 0 | 1 << 1  # abstract unix sockets, signals
#: Linux 5.19, the first that can move files between directories of ours. What later versions add:
OLDEST_LANDLOCK: Final = 2
_SINCE = {3: "truncation", 4: "TCP ports", 5: "ioctl of devices", 6: "signals and abstract sockets"}
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_PATH_BENEATH, _NET_PORT, _VERSION = 1, 2, 1

# --- capabilities and prctl: linux/capability.h, linux/prctl.h ----------------------------------------------

CAP_SETPCAP, CAP_NET_ADMIN = 8, 12
_CAPABILITY_VERSION = 0x20080522
_SET_PDEATHSIG, _GET_DUMPABLE, _SET_DUMPABLE, _SET_NAME, _GET_NAME = 1, 3, 4, 15, 16
_CAPBSET_DROP, _SET_SECUREBITS, _SET_NO_NEW_PRIVS, _CAP_AMBIENT, _SET_MDWE = 24, 28, 38, 47, 65
_AMBIENT_RAISE, _AMBIENT_CLEAR_ALL = 2, 4
#: Root's number gives nothing, changing numbers keeps nothing, nothing becomes ambient; each one locked.
_SECUREBITS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7
_MDWE_REFUSE_EXEC_GAIN = 1

# --- seccomp: seccomp.h of libseccomp ----------------------------------------------------------------------

KILL, ALLOW = 0x80000000, 0x7FFF0000
EPERM, ENOSYS = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ATTR_BAD_ARCH, _ATTR_TSYNC, _ATTR_OPTIMIZE = 2, 4, 8
_MASKED_EQ = 7

#: Calls that pass whatever their arguments: what a party, CPython, Trio, numpy and glibc were seen to make in
#: sessions, rotations, provisioning and their errors, with the forms that other architectures and newer
#: versions have for the same purpose.
CALLS: Final = (
    # files, by name and by descriptor; Landlock says which
    "access faccessat faccessat2 open openat close close_range read readv pread64 preadv preadv2 write "
    "writev pwrite64 pwritev pwritev2 lseek stat lstat fstat newfstatat statx statfs fstatfs readlink "
    "readlinkat "
    "memfd_create getdents64 getcwd mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 ftruncate "
    "fallocate fadvise64 fsync fdatasync flock fcntl dup dup2 dup3 pipe pipe2 umask inotify_init1 "
    "inotify_add_watch inotify_rm_watch "
    # memory
    "brk munmap mremap madvise msync mincore mlock mlock2 munlock membarrier "
    # waiting
    "epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 poll ppoll select pselect6 eventfd2 "
    "futex nanosleep clock_nanosleep sched_yield restart_syscall "
    # sockets, once made; Landlock says which ports
    "bind connect listen accept accept4 shutdown getsockname getpeername getsockopt setsockopt sendto "
    "sendmsg sendmmsg recvfrom recvmsg recvmmsg "
    # threads and processes of our own; Landlock keeps signals among them
    "set_tid_address set_robust_list get_robust_list rseq arch_prctl gettid getpid getppid getpgrp "
    "getpgid getsid setsid kill tgkill pidfd_open pidfd_send_signal wait4 waitid exit exit_group "
    "sched_getaffinity getcpu sched_getparam sched_getscheduler "
    # signals
    "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack "
    "setitimer timer_create timer_settime timer_delete "
    # who and what we are
    "getuid geteuid getgid getegid getresuid getresgid getgroups capget uname sysinfo getrusage times "
    "getrlimit setrlimit prlimit64 getrandom clock_gettime clock_getres gettimeofday time "
).split()
#: Starting wireguard-go; Landlock leaves it and our own interpreter to be started.
CHILDREN: Final = ("execve", "fork", "vfork")
ABSENT: Final = (
    "clone3 openat2 futex_wait futex_wake futex_requeue futex_waitv memfd_secret mseal "
    "map_shadow_stack rseq_slice_yield "
).split()
FATAL: Final = (
    # other processes
    "ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_getfd "
    # file systems, namespaces and roots
    "mount umount2 umount mount_setattr move_mount open_tree open_tree_attr fsopen fsconfig fsmount "
    "fspick pivot_root chroot unshare setns open_by_handle_at swapon swapoff quotactl quotactl_fd acct "
    # the kernel itself
    "bpf perf_event_open kexec_load kexec_file_load init_module finit_module delete_module "
    "create_module reboot iopl ioperm modify_ldt syslog lookup_dcookie vhangup "
    # its clock and names
    "settimeofday clock_settime stime sethostname setdomainname "
    # known ways in: its keyrings, faults handled by users, rings
    "add_key request_key keyctl userfaultfd io_uring_setup io_uring_enter io_uring_register "
).split()

_IOCTLS: Final = (
    0x5401,  # TCGETS: is it a terminal?
    0x5413,  # TIOCGWINSZ
    0x541B,  # FIONREAD
    0x5421,  # FIONBIO
    0x5450,  # FIONCLEX
    0x5451,  # FIOCLEX
)
_TUNNEL_IOCTLS: Final = (
    0x8910,  # SIOCGIFNAME
    0x8913,  # SIOCGIFFLAGS
    0x8921,  # SIOCGIFMTU
    0x8922,  # SIOCSIFMTU
    0x8933,  # SIOCGIFINDEX
    0x400454CA,  # TUNSETIFF
    0x400454D0,  # TUNSETOFFLOAD
    0x800454D2,  # TUNGETIFF
)
_NSM_IOCTL: Final = 0xC0200A00  # linux/nsm.h: one request to Nitro's security module
_PRCTLS: Final = (_SET_PDEATHSIG, _GET_DUMPABLE, _SET_NAME, _GET_NAME)
_PROT_WRITE, _PROT_EXEC = 2, 4
_CLONE_THREAD, _CLONE_NEW = 0x00010000, 0x7E020000  # every namespace
_KIND = 0xF  # of a socket's type, without SOCK_CLOEXEC and SOCK_NONBLOCK
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_STREAM, _DATAGRAM, _RAW = 1, 2, 3
_TCP, _UDP, _ROUTE, _GENERIC = 6, 17, 0, 16


@dataclass(frozen=True)
class Match:
    """A call passes if argument number `argument`, of which `mask` counts, is `value`."""

    argument: int
    value: int
    mask: int = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Confinement:
    """What holds now, for log and status. `lacks` is what this kernel's Landlock does not know."""

    landlock: int
    lacks: tuple[str, ...]
    net_admin: bool

    def __str__(self) -> str:
        text = f"Landlock {self.landlock}, seccomp, {'CAP_NET_ADMIN' if self.net_admin else 'no capability'}"
        return f"{text}; this kernel lacks rules on: {', '.join(self.lacks)}" if self.lacks else text


def confine(config: Config) -> Confinement:
    """Confine this process for good, as the file says. What was opened before stays open.

    Raises `EnvironmentMissing` where the host cannot do it, and `BadInput` where the party could not work
    afterwards; then the process must end, since a part may hold already.
    """
    alone = len(os.listdir("/proc/self/task"))
    if alone != 1:
        raise LocalError(f"confine: {alone} threads run; those that were started before would stay free")
    tunnel = config.tunnel.mode == "wireguard"
    version = landlock_version()
    if version < OLDEST_LANDLOCK:
        raise EnvironmentMissing(
            f"confinement: this kernel has no Landlock of version {OLDEST_LANDLOCK}; needs Linux 5.19 with "
            f"CONFIG_SECURITY_LANDLOCK, and landlock among the names after lsm= at boot; {OFF}"
        )
    keep = (CAP_NET_ADMIN,) if tunnel else ()
    lacking = [each for each in keep if not _permitted() >> each & 1]
    if lacking:
        raise EnvironmentMissing(
            "confinement: CAP_NET_ADMIN is not held, which the tunnel needs; run as root, or with "
            "AmbientCapabilities=CAP_NET_ADMIN in the unit, or with: setpriv --inh-caps +net_admin "
            "--ambient-caps +net_admin"
        )
    _refuse_low_ports(config)
    library = _libseccomp()
    _make_directories(config, tunnel)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _raise_lock_limit()
    _prctl("no_new_privs", _SET_NO_NEW_PRIVS, 1)
    _prctl(None, _SET_MDWE, _MDWE_REFUSE_EXEC_GAIN)  # Linux 6.3; the filter refuses nearly the same
    _restrict_files(config, version)
    _drop_capabilities(keep)
    _prctl("dumpable", _SET_DUMPABLE, 0)
    nitro = config.attester is not None and config.attester.kind == "nitro"
    _filter_calls(library, tunnel, nitro)
    _verify(config, keep)
    lacks = tuple(what for since, what in _SINCE.items() if since > version)
    return Confinement(version, lacks, tunnel)


# --- what a party needs ------------------------------------------------------------------------------------


_FETCHING: Final = ("keys.tpm.", "keys.kms.", "keys.oci.", "keys.threshold.", "keys.counter")


def ports(config: Config) -> tuple[set[int], set[int]]:
    """TCP ports that may be listened on, and that may be connected to."""
    listening = {address.port for _, address in _listens(config)}
    connecting = {peer.port for peer in config.others}
    for peer in config.others:  # and whatever else of theirs is an address for TCP
        named = {entry.name: getattr(peer, entry.name) for entry in fields(peer)}
        connecting |= {
            at.port for name, at in named.items() if isinstance(at, Address) and name not in _OF_UDP
        }
    if config.attester is not None and isinstance(config.attester.device, Address):
        connecting.add(config.attester.device.port)
    if config.keys.source == "tpm" and isinstance(config.keys.tpm.device, Address):
        connecting.add(config.keys.tpm.device.port)
    if config.tunnel.mode == "wireguard":
        listening.add(CONTROL_PORT)  # the proof of a new generation, inside it
        connecting.add(CONTROL_PORT)
    return listening, connecting


def rights(config: Config) -> Iterator[tuple[Path, int]]:
    """Each file or directory that the party may use, and how. What does not exist is passed over."""
    # Python and what it imports, now and later.
    python = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    packages = ("site-packages", "dist-packages", "lib-dynload")
    python |= {entry for entry in sys.path if entry.endswith(packages)}
    python |= {str(Path(package.__file__).parent) for package in (mimir, wg) if package.__file__}
    if site.ENABLE_USER_SITE:
        python.add(site.getusersitepackages())
    for name in sorted(python):
        yield Path(name), READ
    yield Path(sys.prefix) / "pyvenv.cfg", READ_FILE
    # Libraries where they usually are, and those that this process runs; what the C library reads for itself.
    for name in sorted(_mapped()):
        yield Path(name), READ_FILE
    for name in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"):
        yield Path(name), READ
    for name in _SYSTEM_FILES:
        yield Path(name), READ
    for name in ("/dev/null", "/dev/zero", "/dev/urandom"):
        yield Path(name), READ_FILE | (WRITE if name == "/dev/null" else 0)
    # The party's own.
    for key, path in _paths(config):
        if key == "attestation.policy":  # with its signatures; both may be replaced while we run
            path = path.parent
        if key.startswith(_FETCHING):
            continue  # what fetches the storage key ran before
        yield path, KEEP if key == "data_dir" else READ
    if config.keys.source == "tpm":
        if isinstance(config.keys.tpm.device, Path):  # the counter
            yield config.keys.tpm.device, READ_FILE | WRITE_FILE | IOCTL_DEV
    elif config.keys.counter is not None:
        yield config.keys.counter.parent, KEEP
    if config.attester is not None and isinstance(config.attester.place, Path):
        # A device, or for configfs the folder in which each report has one of its own.
        yield config.attester.place, READ | WRITE | IOCTL_DEV | MAKE_DIR | REMOVE_DIR
        yield Path("/sys/kernel/security"), READ  # the log of a measured boot
    if config.tunnel.mode == "wireguard":
        yield Path("/proc/sys/net/ipv4/conf"), READ | WRITE  # reverse-path filters of our interfaces
        yield Path("/dev/net/tun"), READ_FILE | WRITE_FILE | IOCTL_DEV
        yield Path(SOCKET_DIRECTORY), READ | MAKE_SOCK | REMOVE_FILE
        programs = [sys.executable, locate_userspace()]
        for program in filter(None, programs):
            yield Path(program), READ_FILE | EXECUTE
            loader = _loader(Path(program))
            if loader is not None:
                yield loader, READ_FILE | EXECUTE


_OF_UDP: Final = ("tunnel_endpoint",)
_SYSTEM_FILES: Final = (
    # Not by process: rules hold for what a name stands for now, and /proc makes those anew.
    "/proc",
    "/sys/devices/system/cpu",
    "/sys/kernel/mm/transparent_hugepage",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/ssl/openssl.cnf",
    # names of hosts
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/run/systemd/resolve",
    "/etc/services",
    "/usr/share/locale",
    "/usr/share/zoneinfo",
)


def _paths(table: Any, where: str = "") -> Iterator[tuple[str, Path]]:
    """Every path that the configuration names, with its key: so a key added later is covered."""
    for entry in fields(table):
        value, at = getattr(table, entry.name), f"{where}{entry.name}"
        if isinstance(value, Path):
            yield at, value
        elif is_dataclass(value):
            yield from _paths(value, f"{at}.")


def _listens(config: Config) -> Iterator[tuple[str, Address]]:
    """Every address that the configuration says to listen on, with its key."""
    for entry in fields(config):
        listen = getattr(getattr(config, entry.name), "listen", None)
        if isinstance(listen, Address):
            yield f"{entry.name}.listen", listen


def _refuse_low_ports(config: Config) -> None:
    first = int(_read("/proc/sys/net/ipv4/ip_unprivileged_port_start") or 1024)
    for key, address in _listens(config):
        if 0 < address.port < first:
            raise ConfigError(
                f"{config.source}: {key} = {address}: a confined party may listen on ports from {first} on; "
                "take one, or lower the sysctl net.ipv4.ip_unprivileged_port_start"
            )


def _make_directories(config: Config, tunnel: bool) -> None:
    """What is made on first use: a rule needs something to hold on to."""
    wanted = [config.data_dir, *([Path(SOCKET_DIRECTORY)] if tunnel else ())]
    if config.keys.source != "tpm" and config.keys.counter is not None:
        wanted.append(config.keys.counter.parent)
    for directory in wanted:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as problem:
            raise BadInput(
                f"{directory}: cannot be made: {problem.strerror}; make it for user {os.geteuid()}"
            ) from None


def _raise_lock_limit() -> None:
    """Keys are kept out of swap, for which the right is about to go; the limit stays."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    infinite = resource.RLIM_INFINITY
    for soft in (infinite, limit[1]):
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, infinite if soft == infinite else limit[1]))
            return


def _mapped() -> set[str]:
    """Every file whose code is in this process."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    return {line[5] for line in lines if len(line) == 6 and "x" in line[1] and line[5].startswith("/")}


def _loader(program: Path) -> Path | None:
    """The dynamic loader that a program names (its PT_INTERP), which the kernel runs for it."""
    try:
        with open(program, "rb") as file:
            head = file.read(64)
            if head[:5] != b"\x7fELF\x02":
                return None
            (table,) = struct.unpack_from("<Q", head, 32)
            size, count = struct.unpack_from("<HH", head, 54)
            for index in range(count):
                file.seek(table + index * size)
                kind, _, offset, _, _, length = struct.unpack("<IIQQQQ", file.read(40))
                if kind == 3 and length < 4096:
                    file.seek(offset)
                    return Path(os.fsdecode(file.read(length).rstrip(b"\0")))
    except (OSError, struct.error):
        pass
    return None


# --- Landlock ----------------------------------------------------------------------------------------------


def landlock_version() -> int:
    """The version that this kernel offers; 0 for none."""
    return max(0, _syscall(_CREATE_RULESET, None, 0, _VERSION))


def _restrict_files(config: Config, version: int) -> None:
    everything = (1 << {2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    net = BIND_TCP | CONNECT_TCP if version >= 4 else 0
    scopes = _SCOPES if version >= 6 else 0
    attributes = struct.pack("=QQQ", everything, net, scopes)
    ruleset = _syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        _fail("Landlock's rules cannot be made")
    try:
        for path, wanted in rights(config):
            _allow_path(ruleset, path, wanted & everything)
        if net:
            for right, numbers in zip((BIND_TCP, CONNECT_TCP), ports(config), strict=True):
                for port in sorted(numbers):
                    rule = struct.pack("=QQ", right, port)
                    if _syscall(_ADD_RULE, ruleset, _NET_PORT, rule, 0):
                        _fail(f"Landlock: port {port}")
        if _syscall(_RESTRICT_SELF, ruleset, 0):
            _fail("Landlock's rules cannot be put in force")
    finally:
        os.close(ruleset)


def _allow_path(ruleset: int, path: Path, wanted: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as problem:
        raise BadInput(f"confinement: {path}: {problem.strerror}") from None
    if not path.is_dir():
        wanted &= _OF_FILES
    rule = struct.pack("=Qi", wanted, handle)
    if _syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0):
        _fail(f"Landlock: {path}")
    if wanted & WRITE and str(path).startswith("/proc/"):
        # The rule is on an inode, and /proc makes a new one when it has forgotten the name: this keeps it.
        _HELD.append(handle)
    else:
        os.close(handle)


_HELD: Final[list[int]] = []

# --- capabilities ------------------------------------------------------------------------------------------


def _permitted() -> int:
    return int(_status("CapPrm"), 16)


def _drop_capabilities(keep: Sequence[int]) -> None:
    """Leave `keep` permitted, effective, and ambient, so that wireguard-go has it; nothing else at all.

    Who may not shrink the bounding set has no need to: with no_new_privs no file gives capabilities.
    """
    able = _permitted() >> CAP_SETPCAP & 1
    _prctl("ambient capabilities", _CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    if able:
        for number in range(int(_read("/proc/sys/kernel/cap_last_cap")) + 1):
            if number not in keep:
                _prctl("bounding set", _CAPBSET_DROP, number)
    mask = sum(1 << number for number in keep)
    _capset(_permitted(), mask)
    for number in keep:
        _prctl("ambient capabilities", _CAP_AMBIENT, _AMBIENT_RAISE, number)
    if able:
        _prctl("securebits", _SET_SECUREBITS, _SECUREBITS)
    _capset(mask, mask)


def _capset(permitted: int, inheritable: int) -> None:
    low, high = 0xFFFFFFFF, 32
    data = struct.pack(
        "=6I",
        *(permitted & low, permitted & low, inheritable & low),
        *(permitted >> high, permitted >> high, inheritable >> high),
    )
    if _libc().capset(struct.pack("=Ii", _CAPABILITY_VERSION, 0), data):
        _fail("capabilities cannot be dropped")


# --- seccomp -----------------------------------------------------------------------------------------------


def _conditions(tunnel: bool, nitro: bool) -> Iterator[tuple[str, tuple[Match, ...]]]:
    """Calls that pass for some arguments only; a call with two entries passes if either fits."""
    for number in (*_IOCTLS, *(_TUNNEL_IOCTLS if tunnel else ()), *((_NSM_IOCTL,) if nitro else ())):
        yield "ioctl", (Match(1, number),)
    for number in _PRCTLS:
        yield "prctl", (Match(0, number),)
    # No memory is writable and executable, nor becomes executable.
    yield "mmap", (Match(2, 0, _PROT_EXEC),)
    yield "mmap", (Match(2, 0, _PROT_WRITE),)
    yield "mprotect", (Match(2, 0, _PROT_EXEC),)
    # Threads; processes of our own only for a tunnel, and never in a new namespace.
    thread = _CLONE_THREAD if not tunnel else 0
    yield "clone", (Match(0, thread, thread | _CLONE_NEW),)
    # TCP and UDP by name: Landlock does not know the other protocols (Multipath TCP, SCTP).
    for family in (_INET, _INET6):
        for kind, protocol in ((_STREAM, _TCP), (_DATAGRAM, _UDP)):
            for number in (0, protocol):
                yield "socket", (Match(0, family), Match(1, kind, _KIND), Match(2, number))
    yield "socket", (Match(0, _UNIX), Match(1, _STREAM, _KIND))
    yield "socketpair", (Match(0, _UNIX),)
    for protocol in (_ROUTE, *((_GENERIC,) if tunnel else ())):
        for kind in (_DATAGRAM, _RAW):  # the same there
            yield "socket", (Match(0, _NETLINK), Match(1, kind, _KIND), Match(2, protocol))


class _ArgCmp(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def _libseccomp() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError:
        raise EnvironmentMissing(
            f"confinement: libseccomp.so.2 is not on this host; apt install libseccomp2; {OFF}"
        ) from None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = (ctypes.c_uint32,)
    library.seccomp_release.argtypes = (ctypes.c_void_p,)
    library.seccomp_load.argtypes = (ctypes.c_void_p,)
    library.seccomp_attr_set.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32)
    library.seccomp_arch_add.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    library.seccomp_arch_remove.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    library.seccomp_export_bpf.argtypes = (ctypes.c_void_p, ctypes.c_int)
    library.seccomp_syscall_resolve_name.argtypes = (ctypes.c_char_p,)
    library.seccomp_rule_add_array.argtypes = (
        *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint),
        ctypes.POINTER(_ArgCmp),
    )
    return library


def can_filter() -> bool:
    """Whether this host can make the filter, and its kernel knows filters."""
    try:
        library = _libseccomp()
        library.seccomp_release(_compile(library, platform.machine(), True))
    except EnvironmentMissing:
        return False
    return Path("/proc/sys/kernel/seccomp/actions_avail").exists()


def _compile(library: ctypes.CDLL, machine: str, tunnel: bool, nitro: bool = False) -> int:
    """The filter for a machine, as a context of libseccomp that the caller releases."""
    token = ARCHITECTURES.get(machine)
    if token is None:
        known = ", ".join(ARCHITECTURES)
        raise EnvironmentMissing(f"confinement: no filter for {machine}, only for {known}; {OFF}")
    context = library.seccomp_init(EPERM)
    if not context:
        _fail("seccomp: no filter can be made")

    def must(result: int, what: str) -> None:
        if result < 0:
            ctypes.set_errno(-result)
            _fail(f"seccomp: {what}")

    if machine != platform.machine():
        must(library.seccomp_arch_add(context, token), machine)
        must(library.seccomp_arch_remove(context, ARCHITECTURES[platform.machine()]), machine)
    must(library.seccomp_attr_set(context, _ATTR_BAD_ARCH, KILL), "calls of other architectures")
    must(library.seccomp_attr_set(context, _ATTR_OPTIMIZE, 2), "binary search")
    plain = {ALLOW: [*CALLS, *(CHILDREN if tunnel else ())], ENOSYS: ABSENT, KILL: FATAL}
    rules = [(action, name, ()) for action, names in plain.items() for name in names]
    for action, name, matches in (*rules, *((ALLOW, *each) for each in _conditions(tunnel, nitro))):
        # By this host's number, which the library takes for a name; below -1 for what only others have.
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:
            continue  # newer than the library: then EPERM
        arguments = (_ArgCmp * len(matches))(
            *(_ArgCmp(each.argument, _MASKED_EQ, each.mask, each.value) for each in matches)
        )
        must(library.seccomp_rule_add_array(context, action, number, len(matches), arguments), name)
    return int(context)


def _filter_calls(library: ctypes.CDLL, tunnel: bool, nitro: bool) -> None:
    context = _compile(library, platform.machine(), tunnel, nitro)
    try:
        library.seccomp_attr_set(context, _ATTR_TSYNC, 1)
        result = library.seccomp_load(context)
        if result:
            ctypes.set_errno(-result)
            _fail("seccomp: the filter cannot be loaded; needs CONFIG_SECCOMP_FILTER")
    finally:
        library.seccomp_release(context)


# --- and does it hold? -------------------------------------------------------------------------------------


def _verify(config: Config, keep: Sequence[int]) -> None:
    """The kernel's own word that it holds, and that the party can go on."""
    mask = sum(1 << number for number in keep)
    wanted = {
        **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapAmb"), f"{mask:016x}"),
        "NoNewPrivs": "1",
        "Seccomp": "2",
    }
    for name, value in wanted.items():
        if (got := _status(name)) != value:
            raise EnvironmentMissing(f"confinement: /proc/self/status says {name} {got}, not {value}; {OFF}")
    for key, path in _paths(config):
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except PermissionError:
            raise BadInput(
                f"{config.source}: {key} = {path}: a confined party may not read it, as it can override no "
                f"permissions; give it to user {os.geteuid()}"
            ) from None
        except OSError:
            pass  # whoever needs it says what is wrong


# --- small things ------------------------------------------------------------------------------------------


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    """-1 for an error, which `ctypes.get_errno` tells. Numbers in full registers: it takes any arguments."""
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return int(_libc().syscall(ctypes.c_long(number), *words))


def _prctl(what: str | None, option: int, *arguments: int) -> None:
    """`what` is named by the error; with None, the kernel need not know the option."""
    padded = [ctypes.c_ulong(each) for each in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc().prctl(option, *padded) and what is not None:
        _fail(what)


def _fail(what: str) -> NoReturn:
    raise EnvironmentMissing(f"confinement: {what}: {os.strerror(ctypes.get_errno())}; {OFF}")


def _status(name: str) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return value.strip()
    return "nothing"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
