"""What somebody who has broken into a party might try next. A program of its own, for test_confine.py.

    python intruder.py PARTY.toml FACTS.json

Puts the confinement of the file in force, unless its `confinement.mode` is "off", and makes each attempt in a
child process. Prints a JSON object with what came of each: "done", the name of an errno, or of a signal.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import mmap
import os
import platform
import resource
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimir import config as configuration
from mimir import confine

libc = ctypes.CDLL(None, use_errno=True)
facts: dict[str, Any] = {}
ATTEMPTS: dict[str, Callable[[], object]] = {}


def attempt(act: Callable[[], object]) -> Callable[[], object]:
    ATTEMPTS[act.__name__] = act
    return act


def call(name: str, *arguments: int | bytes | None) -> int:
    """A system call by name, past whatever a library would say of it."""
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = libc.syscall(ctypes.c_long(numbers[name]), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return int(result)


def run(*words: str) -> None:
    """Become another program in a child of the child; a status of its own counts as refused by it."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_RDWR), 2)
            os.execv(words[0], words)
        except OSError as problem:
            os._exit(200 if problem.errno == errno.EACCES else 201)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise OSError({200: errno.EACCES}.get(status, errno.ENOEXEC), words[0])


# --- files ---


@attempt
def read_shadow() -> None:
    Path("/etc/shadow").read_bytes()


@attempt
def read_the_key_of_another_party() -> None:
    Path(facts["other_key"]).read_bytes()


@attempt
def list_the_configurations_folder() -> None:
    os.listdir(facts["folder"])


@attempt
def read_the_environment_of_another_process() -> None:
    Path(f"/proc/{facts['victim']}/environ").read_bytes()


@attempt
def read_the_memory_of_another_process() -> None:
    Path(f"/proc/{facts['victim']}/mem").open("rb").close()


@attempt
def write_beside_data_dir() -> None:
    (Path(facts["folder"]) / "new").write_text("")


@attempt
def change_ones_own_configuration() -> None:
    Path(facts["config"]).open("r+").close()


@attempt
def empty_a_file_by_opening_it() -> None:
    os.close(os.open(facts["spoil"], os.O_RDONLY | os.O_TRUNC))


@attempt
def empty_a_file_by_name() -> None:
    os.truncate(facts["spoil"], 0)


@attempt
def move_a_file_out() -> None:
    inside = Path(facts["data"]) / "moving"
    inside.write_text("")
    try:
        os.rename(inside, Path(facts["folder"]) / "moved")
    finally:
        inside.unlink(missing_ok=True)


@attempt
def name_the_kernels_helper() -> None:
    helper = Path("/proc/sys/kernel/core_pattern")
    helper.write_text(facts["core_pattern"])  # what it says already


@attempt
def make_a_device() -> None:
    at = Path(facts["data"]) / "null"
    os.mknod(at, 0o600 | 0o020000, os.makedev(1, 3))
    at.unlink()


@attempt
def make_a_link() -> None:
    at = Path(facts["data"]) / "link"
    os.symlink("/etc/shadow", at)
    at.unlink()


@attempt
def let_a_program_run_as_its_owner() -> None:
    os.chmod(facts["own"], 0o4755)


@attempt
def give_a_file_away() -> None:
    os.chown(facts["own"], 65534, 65534)


# --- code ---


@attempt
def run_a_shell() -> None:
    run("/bin/sh", "-c", "exit 0")


@attempt
def run_a_shell_by_the_loader() -> None:
    run(str(facts["loader"]), "/bin/sh", "-c", "exit 0")


@attempt
def run_a_program_of_ones_own() -> None:
    at = Path(facts["data"]) / "program"
    os.close(os.open(at, os.O_CREAT | os.O_WRONLY, 0o700))
    at.write_bytes(facts["true"])
    try:
        run(str(at))
    finally:
        at.unlink()


@attempt
def have_memory_that_is_written_and_run() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


@attempt
def run_memory_that_was_written() -> None:
    page = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    call("mprotect", address, 4096, mmap.PROT_READ | mmap.PROT_EXEC)


# --- other processes ---


@attempt
def trace_a_process() -> None:
    call("ptrace", 16, facts["victim"], 0, 0)  # PTRACE_ATTACH
    os.waitpid(facts["victim"], 0x40000000)  # __WALL
    call("ptrace", 17, facts["victim"], 0, 0)


@attempt
def read_across_processes() -> None:
    call("process_vm_readv", facts["victim"], None, 0, None, 0, 0)


@attempt
def take_a_descriptor() -> None:
    call("pidfd_getfd", os.pidfd_open(facts["victim"]), 0, 0)


@attempt
def signal_a_process() -> None:
    os.kill(facts["victim"], 0)


@attempt
def reach_an_abstract_socket() -> None:
    socket.socket(socket.AF_UNIX).connect(facts["abstract"].encode())


# --- network ---


@attempt
def send_raw_packets() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()


@attempt
def listen_to_the_wire() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()


@attempt
def use_tcp_under_another_name() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close()  # Multipath TCP


@attempt
def ask_who_is_connected() -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4).close()  # NETLINK_SOCK_DIAG


@attempt
def use_the_kernels_ciphers() -> None:
    socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET).close()


@attempt
def listen_on_another_port() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", facts["free_port"]))


@attempt
def listen_on_any_port() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))


@attempt
def connect_elsewhere() -> None:
    socket.create_connection(("127.0.0.1", facts["open_port"]), 5).close()


# --- the kernel ---


@attempt
def mount_a_file_system() -> None:
    call("mount", b"none", facts["data"].encode(), b"tmpfs", 0, None)
    call("umount2", facts["data"].encode(), 0)


@attempt
def have_ones_own_mounts() -> None:
    call("unshare", 0x00020000)


@attempt
def have_a_user_namespace() -> None:
    child = call("clone", 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


@attempt
def have_another_root() -> None:
    call("chroot", b"/")


@attempt
def load_a_module() -> None:
    call("init_module", None, 0, b"")


@attempt
def load_a_bpf_program() -> None:
    attributes = (1).to_bytes(4, "little") * 4  # BPF_MAP_CREATE of a hash: key 1? the sizes are checked later
    call("bpf", 0, attributes, len(attributes))


@attempt
def start_another_kernel() -> None:
    call("kexec_load", 0, 0, None, 0xFFFF0000)  # flags that there are not


@attempt
def restart_the_machine() -> None:
    call("reboot", 0, 0, 0, 0)  # without the numbers that would do it


@attempt
def use_a_keyring() -> None:
    call("keyctl", 0, -3, 1, 0, 0)  # KEYCTL_GET_KEYRING_ID of the session


@attempt
def make_a_ring() -> None:
    call("io_uring_setup", 1, None)


@attempt
def handle_faults() -> None:
    os.close(call("userfaultfd", 0))


@attempt
def count_events() -> None:
    call("perf_event_open", None, 0, -1, -1, 0)


@attempt
def set_the_clock() -> None:
    call("settimeofday", None, None)


@attempt
def rename_the_host() -> None:
    name = os.uname().nodename.encode()
    call("sethostname", name, len(name))


# --- oneself ---


@attempt
def become_somebody_else() -> None:
    os.setuid(65534)


@attempt
def leave_ones_groups() -> None:
    os.setgroups([])


@attempt
def take_capabilities_back() -> None:
    low, high = facts["capabilities"] & 0xFFFFFFFF, facts["capabilities"] >> 32
    call("capset", struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", low, low, 0, high, high, 0))


@attempt
def go_first() -> None:
    os.setpriority(os.PRIO_PROCESS, 0, -1)


@attempt
def have_a_core_dump() -> None:

    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@attempt
def be_read_again() -> None:
    call("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE


@attempt
def call_as_another_machine() -> None:
    """`getpid` by the 32-bit entry of this processor."""
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, "only there")
    facts["entry"]()


# --- and what a party does all the time ---

DUTIES: dict[str, Callable[[], object]] = {}


def duty(act: Callable[[], object]) -> Callable[[], object]:
    DUTIES[act.__name__] = act
    return act


@duty
def read_ones_key() -> None:
    Path(facts["key"]).read_bytes()


@duty
def keep_shares() -> None:
    new = Path(facts["data"]) / "model.new"
    (new / "part").parent.mkdir()
    (new / "part").write_bytes(b"share")
    new.rename(new.with_suffix(""))
    (new.with_suffix("") / "part").unlink()
    new.with_suffix("").rmdir()


@duty
def listen_for_peers() -> None:
    for port in facts["ports"]:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            sock.listen()


@duty
def connect_to_a_peer() -> None:
    socket.create_connection(("127.0.0.1", facts["peer_port"]), 5).close()


@duty
def find_a_host() -> None:
    socket.getaddrinfo("localhost", 1)


@duty
def start_a_thread() -> None:
    thread = threading.Thread(target=len, args=("",))
    thread.start()
    thread.join()


@duty
def split_a_kernel() -> None:
    from mimir import kernels

    stream = importlib.import_module("numpy").zeros(1 << 18)
    before = len(os.listdir("/proc/self/task"))  # numpy has started some by now
    kernels.use_threads(3)
    kernels.prg(bytes(32), 1, stream)
    if len(os.listdir("/proc/self/task")) - before != 2:
        raise OSError(errno.EAGAIN, "no threads for kernels")


@duty
def import_what_is_needed() -> None:
    for name in ("cryptography.x509", "numpy", "pyroute2"):
        importlib.import_module(name)


@duty
def run_ones_own_interpreter() -> None:
    if facts["tunnel"]:
        run(sys.executable, "-I", "-S", "-c", "import ctypes; ctypes.CDLL(None)")


def outcome(act: Callable[[], object], forks: bool) -> str:
    """What comes of it: in a child where there may be one, as some attempts end a process."""
    if not forks:
        try:
            act()
        except OSError as problem:
            return errno.errorcode.get(problem.errno or 0, str(problem))
        return "done"
    child = os.fork()
    if child == 0:
        status = 255
        try:
            act()
            status = 0
        except OSError as problem:
            status = problem.errno or 254
        except ValueError:  # as Python calls an EPERM of setrlimit
            status = errno.EPERM
        except BaseException as problem:
            print(act, problem, file=sys.stderr)
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        return signal.Signals(-status).name
    return "done" if status == 0 else errno.errorcode.get(status, f"status {status}")


def main() -> None:
    config = configuration.load(sys.argv[1])
    facts.update(json.loads(Path(sys.argv[2]).read_text()))
    facts["true"] = Path("/bin/true").read_bytes()
    facts["loader"] = confine._loader(Path("/bin/true"))
    facts["capabilities"] = confine._permitted()
    facts["core_pattern"] = Path("/proc/sys/kernel/core_pattern").read_text()
    facts["tunnel"] = config.tunnel.mode == "wireguard"
    if platform.machine() == "x86_64":
        facts["entry"] = old_entry()
    listening = socket.create_server(("127.0.0.1", 0))
    facts["open_port"] = listening.getsockname()[1]
    peer = socket.create_server(("127.0.0.1", facts["peer_port"]))
    said: dict[str, Any] = {}
    if config.confinement.mode == "enforce":
        said["confinement"] = str(confine.confine(config))
    only = sys.argv[3:]
    for name, act in {**ATTEMPTS, **DUTIES}.items():
        if not only or name in only:
            said[name] = outcome(act, forks=not only)
    for sock in (listening, peer):
        sock.close()
    print(json.dumps(said))


def old_entry() -> Callable[[], int]:
    """mov eax, 20 (getpid there); int 0x80; ret - in a page of its own, made while one may."""
    code = bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3])
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    facts["page"] = page
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))


library = confine._libseccomp()
numbers = {
    name: library.seccomp_syscall_resolve_name_arch(confine.ARCHITECTURES[platform.machine()], name.encode())
    for name in (*confine.FATAL, "mprotect", "clone", "capset", "prctl")
}

if __name__ == "__main__":
    main()
