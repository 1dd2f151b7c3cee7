"""What a party that was broken into can no longer do, tried; and that it can still do its work.

That whole parties work confined, as root in namespaces and with rotation, is shown by test_local_mesh.py and
test_generations.py: confinement is the default there too.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from federation import free_ports, write_federation
from lab import why_not

from mimir import boot, confine, doctor
from mimir import config as configuration
from mimir.attesters import nsm
from mimir.errors import BadInput, ConfigError, EnvironmentMissing, LocalError

TESTS = Path(__file__).parent
INTRUDER = TESTS / "intruder.py"
#: What an unconfined root meets where the attempt, for the safety of the machine that runs the tests, is made
#: with arguments that nothing comes of: it was let through to the kernel's own checks.
HARMLESS = {
    "load_a_module": {"EPERM", "EFAULT", "ENOEXEC", "ENOSYS"},  # EPERM where all modules are locked out
    "load_a_bpf_program": {"done", "EINVAL", "EPERM"},
    "start_another_kernel": {"EINVAL", "EPERM", "ENOSYS"},
    "restart_the_machine": {"EINVAL"},
    "make_a_ring": {"EFAULT", "EPERM", "ENOSYS"},
    "count_events": {"EFAULT", "EACCES", "ENOENT"},
    "take_a_descriptor": {"done", "EBADF"},
    "use_a_keyring": {"done", "ENOKEY", "ENOSYS"},
    "handle_faults": {"done", "ENOSYS"},
    "use_tcp_under_another_name": {"done", "ENOPROTOOPT", "EPROTONOSUPPORT"},
    "use_the_kernels_ciphers": {"done", "EAFNOSUPPORT"},
    "have_a_user_namespace": {"done", "EPERM", "ENOSPC"},
    "call_as_another_machine": {"done", "SIGSEGV", "ENOSYS"},  # a kernel may have no 32-bit entry
}
FATAL = {
    *("trace_a_process", "read_across_processes", "take_a_descriptor", "mount_a_file_system"),
    *("have_ones_own_mounts", "have_another_root", "load_a_module", "load_a_bpf_program"),
    *("start_another_kernel", "restart_the_machine", "use_a_keyring", "make_a_ring", "handle_faults"),
    *("count_events", "set_the_clock", "rename_the_host"),
}
REFUSED = {"EPERM", "EACCES"}


def may_everything() -> bool:
    return os.geteuid() == 0 and confine._permitted() >> 21 & 1 == 1 and confine.landlock_version() >= 4


def write_facts(folder: Path, tunnel: bool, mode: str) -> tuple[Path, Path, dict[str, Any]]:
    """A party's real file, and what the intruder knows of its surroundings."""
    folder.mkdir()
    party = folder / "party"
    party.mkdir(mode=0o700)
    configs, _ = write_federation(party)
    text = configs[0].read_text() + f'[confinement]\nmode = "{mode}"\n'
    if tunnel:
        old = '[tunnel]\nmode = "none"\n'
        new = (
            '[tunnel]\nmode = "wireguard"\ninterface = "none0"\naddress = "10.9.0.1/24"\n'
            'private_key = "tunnel.key"\nlisten_port = 51820\n'
        )
        assert old in text
        text = text.replace(old, new)
        for number in range(3):
            more = (
                f'tunnel_public_key = "{number:064x}"\ntunnel_endpoint = "192.0.2.{number}:51820"\n'
                f'tunnel_allowed = ["10.9.0.{number + 1}/32"]\n'
            )
            text = text.replace(f'name = "p{number}"\n', f'name = "p{number}"\n{more}')
        (party / "tunnel.key").write_text("")
    configs[0].write_text(text)
    config = configuration.load(configs[0])
    config.data_dir.mkdir(mode=0o700)
    own = config.data_dir / "own"
    own.write_text("")
    (party / "spoil").write_text("something")
    facts = {
        "config": str(configs[0]),
        "folder": str(party),
        "data": str(config.data_dir),
        "key": str(config.identity_key),
        "other_key": str(party / "party1.key"),
        "spoil": str(party / "spoil"),
        "own": str(own),
        "free_port": free_ports(1)[0],
        "ports": [config.mesh.listen.port, config.control.listen.port],
        "peer_port": config.others[0].port,
    }
    return configs[0], party / "facts.json", facts


@pytest.fixture
def outside() -> Iterator[dict[str, Any]]:
    """A process and a socket of somebody else on this host."""
    name = f"\0mimir-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(name)
        abstract.listen(16)
        victim = subprocess.Popen(["sleep", "600"])
        yield {"victim": victim.pid, "abstract": name}
        victim.kill()
        victim.wait()


def intrude(
    folder: Path, facts: dict[str, Any], tunnel: bool, mode: str, *only: str, before: tuple[str, ...] = ()
) -> dict[str, str]:
    config, at, own = write_facts(folder, tunnel, mode)
    at.write_text(json.dumps(facts | own))
    words = [*before, sys.executable, str(INTRUDER), str(config), str(at), *only]
    # The folder of the tests is no part of a party: what it needs of it is imported before.
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, str] = json.loads(done.stdout)
    return said


@pytest.mark.skipif(not may_everything(), reason="needs root with all its rights, and Landlock 4")
def test_a_party_that_was_broken_into_can_do_no_more_than_a_party(
    tmp_path: Path, outside: dict[str, Any]
) -> None:
    """Every attempt fails, and each one works for the same user without confinement: so it can fail here."""
    confined = intrude(tmp_path / "confined", outside, True, "enforce")
    free = intrude(tmp_path / "free", outside, True, "off")
    assert "CAP_NET_ADMIN" in confined.pop("confinement") and "confinement" not in free
    sources = {"read_ones_key", "keep_shares", "listen_for_peers", "connect_to_a_peer", "find_a_host"}
    duties = sources | {
        "start_a_thread",
        "split_a_kernel",
        "import_what_is_needed",
        "run_ones_own_interpreter",
    }
    assert {name: confined.pop(name) for name in duties} == dict.fromkeys(duties, "done")
    assert {name: free.pop(name) for name in duties} == dict.fromkeys(duties, "done")
    for name, came in free.items():
        assert came in HARMLESS.get(name, {"done"}), f"{name}, unconfined: {came}"
    for name, came in confined.items():
        wanted = {"SIGSYS"} if name in FATAL else REFUSED
        if name == "call_as_another_machine":
            wanted = {"SIGSYS", "SIGSEGV", "ENOSYS"}
        elif name == "run_a_shell_by_the_loader":
            wanted = {"ENOEXEC"}  # the loader runs and may not read the shell
        assert came in wanted, f"{name}, confined: {came}"
    assert free.keys() == confined.keys() and len(free) > 50


def test_without_a_tunnel_a_party_needs_no_rights_and_starts_nothing(
    tmp_path: Path, outside: dict[str, Any]
) -> None:
    """Also as a user without any right."""
    if confine.landlock_version() < confine.OLDEST_LANDLOCK:
        pytest.skip("this kernel has no Landlock")
    tries = ["read_shadow", "read_the_key_of_another_party", "write_beside_data_dir", "signal_a_process"]
    tries += ["run_a_shell", "send_raw_packets", "become_somebody_else", "run_memory_that_was_written"]
    duties = ["read_ones_key", "keep_shares", "listen_for_peers", "start_a_thread", "split_a_kernel"]
    duties += ["import_what_is_needed"]
    said = intrude(tmp_path / "party", outside, False, "enforce", *tries, *duties)
    assert "no capability" in said.pop("confinement")
    assert {name: said.pop(name) for name in duties} == dict.fromkeys(duties, "done")
    assert said.keys() == set(tries) and set(said.values()) <= REFUSED, said


# --- the filter, read ---------------------------------------------------------------------------------------


def filter_of(machine: str, tunnel: bool) -> list[tuple[int, int, int, int]]:
    library = confine._libseccomp()
    context = confine._compile(library, machine, tunnel)
    with tempfile.TemporaryFile() as file:
        assert library.seccomp_export_bpf(context, file.fileno()) == 0
        library.seccomp_release(context)
        file.seek(0)
        return list(struct.iter_unpack("=HBBI", file.read()))


def judge(program: list[tuple[int, int, int, int]], machine: str, number: int, *arguments: int) -> int:
    """Run a classic BPF program as the kernel would, over one system call."""
    words = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    token = confine.ARCHITECTURES[machine]
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, token, 0, *(each % 2**64 for each in words))
    accumulator, at = 0, 0
    while True:
        code, yes, no, k = program[at]
        at += 1
        if code == 0x20:  # load
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif code == 0x54:  # and
            accumulator &= k
        elif code == 0x05:  # jump
            at += k
        elif code == 0x06:  # return
            return k
        else:
            true = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k}[code]
            at += yes if true else no


@pytest.mark.parametrize("machine", confine.ARCHITECTURES)
def test_the_filter_decides_as_its_lists_say(machine: str) -> None:
    library = confine._libseccomp()
    with_tunnel, without = filter_of(machine, True), filter_of(machine, False)

    def number(name: str) -> int:
        return int(library.seccomp_syscall_resolve_name_arch(confine.ARCHITECTURES[machine], name.encode()))

    known = 0
    for names, wanted in (
        (confine.CALLS, confine.ALLOW),
        (confine.ABSENT, confine.ENOSYS),
        (confine.FATAL, confine.KILL),
    ):
        for name in names:
            if number(name) >= 0:
                known += 1
                for program in (with_tunnel, without):
                    assert judge(program, machine, number(name), 1, 2, 3) == wanted, name
    assert known > 150
    for name in ("execve", "fork", "vfork"):
        if number(name) >= 0:
            assert judge(with_tunnel, machine, number(name)) == confine.ALLOW
            assert judge(without, machine, number(name)) == confine.EPERM
    cases = [  # name, arguments, with a tunnel, without
        ("mmap", (0, 4096, 3, 0x22), True, True),
        ("mmap", (0, 4096, 5, 2), True, True),
        ("mmap", (0, 4096, 7, 0x22), False, False),
        ("mprotect", (0, 4096, 3), True, True),
        ("mprotect", (0, 4096, 5), False, False),
        ("mprotect", (0, 4096, 1 << 32 | 4), False, False),  # what the kernel cuts off does not help
        ("pkey_mprotect", (0, 4096, 1), False, False),
        ("clone", (0x3D0F00,), True, True),  # a thread
        ("clone", (17,), True, False),  # a process
        ("clone", (0x10000000 | 17,), False, False),  # in a user namespace
        ("clone", (0x3D0F00 | 0x20000,), False, False),
        ("socket", (2, 1 | 0o2000000, 0), True, True),
        ("socket", (10, 2, 17), True, True),
        ("socket", (2, 3, 1), False, False),  # raw
        ("socket", (2, 2, 1), False, False),  # echo requests
        ("socket", (2, 1, 262), False, False),  # Multipath TCP
        ("socket", (2, 1, 132), False, False),  # SCTP
        ("socket", (1, 1, 0), True, True),
        ("socket", (1, 2, 0), False, False),
        ("socket", (16, 3, 0), True, True),
        ("socket", (16, 2, 16), True, False),
        ("socket", (16, 3, 9), False, False),  # audit
        ("socket", (17, 3, 0), False, False),
        ("socket", (40, 1, 0), False, False),
        ("ioctl", (0, 0x5401), True, True),
        ("ioctl", (0, 0x5412), False, False),  # typing into somebody's terminal
        ("ioctl", (0, 0x400454CA), True, False),
        ("prctl", (1, 9), True, True),
        ("prctl", (4, 1), False, False),
        ("capset", (), False, False),
        ("setuid", (0,), False, False),
        ("seccomp", (1,), False, False),
    ]
    for name, arguments, tunnel, alone in cases:
        for program, passes in ((with_tunnel, tunnel), (without, alone)):
            got = judge(program, machine, number(name), *arguments)
            assert got == (confine.ALLOW if passes else confine.EPERM), (name, arguments)
    other = next(each for each in confine.ARCHITECTURES if each != machine)
    assert judge(with_tunnel, other, number("read")) == confine.KILL
    if machine == "x86_64":
        assert judge(with_tunnel, machine, 0x40000000) == confine.KILL  # x32
    assert judge(with_tunnel, machine, 1000) == confine.EPERM  # a call of the future


# --- what it asks of the host -------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> configuration.Config:
    configs, _ = write_federation(tmp_path)
    return configuration.load(configs[0])


def test_it_names_what_the_host_lacks(config: configuration.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this changes the process that runs the tests: each refusal comes before."""
    monkeypatch.setattr(os, "listdir", lambda _: ["1"])
    monkeypatch.setattr(confine, "_prctl", lambda *_: pytest.fail("went on"))
    with monkeypatch.context() as patch:
        patch.setattr(confine, "landlock_version", lambda: 1)
        with pytest.raises(EnvironmentMissing, match=r"no Landlock.*lsm="):
            confine.confine(config)
    with monkeypatch.context() as patch:
        patch.setattr(confine.ctypes, "CDLL", _no_library)
        patch.setattr(confine, "landlock_version", lambda: 7)
        with pytest.raises(EnvironmentMissing, match="apt install libseccomp2"):
            confine.confine(config)
    with pytest.raises(EnvironmentMissing, match="no filter for riscv64"):
        confine._compile(confine._libseccomp(), "riscv64", False)
    with monkeypatch.context() as patch:
        patch.setattr(confine, "_permitted", lambda: 0)
        tunnel = configuration.load(TESTS.parent / "configs" / "three.toml")
        with pytest.raises(EnvironmentMissing, match=r"CAP_NET_ADMIN is not held.*AmbientCapabilities"):
            confine.confine(tunnel)


def _no_library(name: str | None, **_: Any) -> Any:
    raise OSError(errno.ENOENT, name)


def test_threads_from_before_are_refused(config: configuration.Config) -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        with pytest.raises(LocalError, match="threads run"):
            confine.confine(config)
    finally:
        over.set()
        thread.join()


def test_a_low_port_and_a_place_that_cannot_be_made_are_refused(tmp_path: Path) -> None:
    configs, _ = write_federation(tmp_path, '[metrics]\nlisten = "127.0.0.1:80"\n')
    config = configuration.load(configs[0])
    with pytest.raises(ConfigError, match=r"metrics\.listen = 127\.0\.0\.1:80: .* ports from"):
        confine._refuse_low_ports(config)
    (tmp_path / "data0").write_text("")
    with pytest.raises(BadInput, match="data0: cannot be made"):
        confine._make_directories(config, False)


def test_what_the_file_names_may_be_read_and_nothing_beside_it(config: configuration.Config) -> None:
    rights = dict(confine.rights(config))
    assert rights[config.data_dir] == confine.KEEP
    assert rights[config.identity_key] == rights[config.source] == confine.READ
    writable = {str(path) for path, right in rights.items() if right & ~confine.READ}
    assert config.keys.counter is not None
    assert writable == {str(config.data_dir), str(config.keys.counter.parent), "/dev/null"}
    listening, connecting = confine.ports(config)
    assert listening == {config.control.listen.port, config.mesh.listen.port}
    assert connecting == {peer.port for peer in config.others}
    # With a tunnel: our interpreter, wireguard-go, the loader, and nothing else, may be run.
    tunnel = configuration.load(TESTS.parent / "configs" / "three.toml")
    runnable = {path for path, right in confine.rights(tunnel) if right & confine.EXECUTE}
    assert runnable <= {
        *map(Path, filter(None, (sys.executable, confine.locate_userspace()))),
        confine._loader(Path(sys.executable)),
    }
    assert "/proc/sys/net/ipv4/conf" in {str(path) for path, right in confine.rights(tunnel) if right & 2}


def test_a_file_of_somebody_else_is_named(
    config: configuration.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        confine, "_status", lambda name: {"NoNewPrivs": "1", "Seccomp": "2"}.get(name, "0" * 16)
    )

    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(errno.EACCES, "denied", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BadInput, match=r"source = .*give it to user"):
        confine._verify(config, ())


@pytest.mark.parametrize("name", ["CapEff", "CapAmb", "NoNewPrivs", "Seccomp"])
def test_what_the_kernel_does_not_confirm_is_an_error(
    config: configuration.Config, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    said = {"NoNewPrivs": "1", "Seccomp": "2"} | {name: "5"}
    monkeypatch.setattr(confine, "_status", lambda each: said.get(each, "0" * 16))
    with pytest.raises(EnvironmentMissing, match=f"says {name} 5"):
        confine._verify(config, ())


def test_the_doctor_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {each.name: each for each in doctor.examine(None, "party")}
    assert found["landlock"].fine and found["seccomp"].fine
    monkeypatch.setattr(confine, "landlock_version", lambda: 0)
    found = {each.name: each for each in doctor.examine(None, "party")}
    assert not found["landlock"].fine and "lsm=" in found["landlock"].remedy


# --- the steps of a start -----------------------------------------------------------------------------------


def test_steps_are_taken_once_and_tell_how_they_ended() -> None:
    start = boot.Boot(("one", "two", "three", "four"))
    with start.step("one") as step:
        assert start.status()[0]["state"] == "running" and start.status()[0]["seconds"] >= 0
        step.note = "so"
    with pytest.raises(ConfigError), start.step("two"):
        raise ConfigError("bad")
    start.skip("three", "none")
    for name in ("one", "three", "five"):
        with pytest.raises(LocalError), start.step(name):
            pass
    states = [(each["step"], each["state"], each["note"]) for each in start.status()]
    assert states == [
        ("one", "done", "so"),
        ("two", "failed", "ConfigError"),
        ("three", "skipped", "none"),
        ("four", "waiting", ""),
    ]


# --- as a user that is not root -----------------------------------------------------------------------------

#: In mounts of its own: what we run can be reached below a home that is root's alone, /dev/net/tun opened,
#: and the place for wireguard-go's sockets is the user's, as systemd's RuntimeDirectory makes it.
_PLACE = """
set -e
base=$1 home=$2 needed=$3 party=$4; shift 4
mount --make-rprivate /
for each in $needed; do
    mkdir -p "$base/kept$each"
    mount --bind "$each" "$base/kept$each"
done
if [ -n "$needed" ]; then mount -t tmpfs -o mode=755 none "$home"; fi
for each in $needed; do
    mkdir -p "$each"
    mount --move "$base/kept$each" "$each"
done
mkdir "$base/devices"
mount -t tmpfs -o mode=755 none "$base/devices"
mknod -m 666 "$base/devices/tun" c 10 200
mount --bind "$base/devices/tun" /dev/net/tun
mkdir -p /var/run/wireguard
mount -t tmpfs -o mode=700,uid=65534,gid=65534 none /var/run/wireguard
chown -R 65534:65534 "$party"
exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps +net_admin --ambient-caps +net_admin "$@"
"""


def below(home: str) -> list[str]:
    """What is run from below a home directory: our interpreter, its packages and the checkout, outermost."""
    paths = {str(Path(each).resolve()) for each in (sys.base_prefix, sys.prefix, TESTS.parent)}
    paths |= {str(Path(each).resolve()) for each in sys.path if each.endswith("site-packages")}
    inside = sorted(each for each in paths if each.startswith(f"{home}/"))
    return [each for each in inside if not any(each.startswith(f"{other}/") for other in inside)]


@pytest.mark.netns
@pytest.mark.slow
def test_a_party_runs_as_a_user_with_nothing_but_cap_net_admin(tmp_path: Path) -> None:
    """The real party, as configs/systemd starts it: it raises its tunnel and serves."""
    if reason := why_not():
        pytest.skip(reason)
    space = f"mimir-confine-{os.getpid()}"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        place = Path(folder)
        place.chmod(0o755)
        config, _, _ = write_facts(place / "run", True, "enforce")
        party = configuration.load(config)
        from wg.keys import generate, save_private

        assert party.tunnel.private_key is not None
        party.tunnel.private_key.unlink()
        (party.data_dir / "own").unlink()  # the intruder's
        save_private(party.tunnel.private_key, generate())
        log = place / "log"
        subprocess.run(["ip", "netns", "add", space], check=True)
        try:
            subprocess.run(["ip", "-n", space, "link", "set", "lo", "up"], check=True)
            words = ["ip", "netns", "exec", space, "unshare", "-m", "sh", "-c", _PLACE, "sh", str(place)]
            words += ["/root", " ".join(below("/root")), str(config.parent), sys.executable, "-c"]
            words += ["import sys; from mimir.__main__ import peer_main; sys.exit(peer_main())"]
            words += ["run", "--config", str(config)]
            with log.open("wb") as output:
                environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
                child = subprocess.Popen(words, stdout=output, stderr=output, env=environment)
            try:
                for _ in range(1200):
                    if "step=serve" in log.read_text() or child.poll() is not None:
                        break
                    threading.Event().wait(0.1)
                assert "step=serve" in log.read_text(), log.read_text()
                status = Path(f"/proc/{child.pid}/status").read_text()
                for wanted in ("Uid:\t65534", "CapEff:\t0000000000001000", "NoNewPrivs:\t1", "Seccomp:\t2"):
                    assert wanted in status
                child.terminate()
                assert child.wait(60) == 0, log.read_text()
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        finally:
            subprocess.run(["ip", "netns", "del", space], check=True)


def test_an_enclave_may_ask_its_security_module_and_others_may_not() -> None:
    assert confine._NSM_IOCTL == nsm.IOCTL

    def allowed(nitro: bool) -> set[int]:
        return {m.value for call, ms in confine._conditions(True, nitro) if call == "ioctl" for m in ms}

    assert allowed(True) - allowed(False) == {nsm.IOCTL}
