"""The files for systemd and AppArmor: they say what they should, and their own checkers take them.

They were not run: that needs systemd as the first process, and a kernel with AppArmor.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mimir import confine
from mimir.errors import BadInput
from mimir.net.identity import Identity
from wg import KeyFileError, generate, load_private, save_private

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
UNIT = CONFIGS / "systemd" / "mimir-peer@.service"
PROFILE = CONFIGS / "apparmor" / "mimir-peer"
PROGRAM = "/opt/mimir/.venv/bin/mimir-peer"
WORST = 25  # of systemd's exposure, in tenths: what is left is what a party is for


def unit() -> dict[str, list[str]]:
    """Every setting of the unit, by name, in order."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, equals, value = line.partition("=")
            assert equals and value, line
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_gives_a_party_what_it_needs_and_nothing_else() -> None:
    said = unit()
    for name in ("AmbientCapabilities", "CapabilityBoundingSet"):
        assert said[name] == ["CAP_NET_ADMIN"]
    assert said["RestrictAddressFamilies"] == ["AF_UNIX AF_INET AF_INET6 AF_NETLINK"]
    assert said["DevicePolicy"] == ["closed"] and said["DeviceAllow"] == ["/dev/net/tun rw"]
    assert said["RuntimeDirectory"] == [Path(confine.SOCKET_DIRECTORY).name]
    assert said["User"] == ["mimir"] and "u mimir " in (CONFIGS / "systemd" / "mimir.conf").read_text()
    assert said["AppArmorProfile"] == [f"-{PROFILE.name}"]
    assert said["ExecStart"][0].split()[:2] == [PROGRAM, "run"]
    for name in (
        *("NoNewPrivileges", "ProtectHome", "PrivateTmp", "ProtectKernelTunables", "ProtectKernelModules"),
        *("ProtectControlGroups", "ProtectClock", "RestrictNamespaces", "RestrictRealtime"),
        *("RestrictSUIDSGID", "LockPersonality", "MemoryDenyWriteExecute", "RemoveIPC"),
    ):
        assert said[name] == ["yes"], name
    assert said["LimitCORE"] == said["MemorySwapMax"] == ["0"] and said["ProtectSystem"] == ["strict"]
    # What the party's own confinement calls, it may still call.
    assert {"capset", "seccomp", "landlock_restrict_self"} <= set(said["SystemCallFilter"][-1].split())
    assert not said["SystemCallFilter"][-1].startswith("~")


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    at = tmp_path / UNIT.name
    at.write_text(UNIT.read_text().replace(PROGRAM, "/bin/true"))  # which it looks for
    verify = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "mimir-peer@0.service")], capture_output=True, text=True
    )
    assert verify.returncode == 0 and verify.stderr == "", verify.stderr
    words = ["systemd-analyze", "security", "--offline=yes", f"--threshold={WORST}", "--no-pager", str(at)]
    security = subprocess.run(words, capture_output=True, text=True)
    if "unrecognized option" in security.stderr:
        pytest.skip("this systemd cannot judge a file")
    assert security.returncode == 0, security.stdout[-300:]


def test_apparmor_takes_the_profile() -> None:
    """And gives exactly the rights that confinement does, in its own terms."""
    text = PROFILE.read_text()
    assert re.findall(r"^  capability (.*),$", text, re.MULTILINE) == ["net_admin"]
    networks = set(re.findall(r"^  network (.*),$", text, re.MULTILINE))
    families = {"inet stream", "inet dgram", "inet6 stream", "inet6 dgram", "unix stream"}
    assert networks == families | {"netlink raw", "netlink dgram"}
    # No other kind of rule, and no program outside the profile.
    kinds = {line.split()[0] for line in text.splitlines() if re.match(r"  [a-z]", line)}
    assert kinds == {"capability", "network", "signal", "include", "deny", "owner"}
    assert not re.search(r" [a-z]*([uUpPcC]x)[a-z]*,$", text, re.MULTILINE)
    parser = shutil.which("apparmor_parser") or shutil.which("/usr/sbin/apparmor_parser")
    if parser is None:
        pytest.skip("needs apparmor_parser (package apparmor)")
    done = subprocess.run([parser, "-Q", "-K", str(PROFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_enclaves_script_is_one_and_knows_its_settings() -> None:
    """It was not run in an enclave; its syntax, and that each name it uses is set."""
    boot, relay = CONFIGS / "nitro" / "boot", CONFIGS / "nitro" / "relay"
    for path in (boot, relay):
        assert subprocess.run(["sh", "-n", str(path)]).returncode == 0
    assert boot.stat().st_mode & 0o111
    given = set(re.findall(r"^([A-Z]+)=", relay.read_text() + boot.read_text(), re.MULTILINE))
    assert set(re.findall(r"\$\{?([A-Z]+)", boot.read_text())) == given
    assert "configs/nitro/boot" in (CONFIGS / "nitro" / "Dockerfile").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a file of root's")
def test_credentials_of_the_unit_are_taken_as_systemd_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd 255 lets the unit's user in by an access list, and the mode then reads 0440."""
    identity, tunnel = tmp_path / "identity.key", tmp_path / "tunnel.key"
    Identity.generate().save(identity)
    save_private(tunnel, generate())
    for path in (identity, tunnel):
        path.chmod(0o440)
    for folder, mode, fine in (
        (None, 0o440, False),
        (tmp_path.parent, 0o440, False),
        (tmp_path, 0o440, True),
        (tmp_path, 0o444, False),
        (tmp_path, 0o460, False),
    ):
        for path in (identity, tunnel):
            path.chmod(mode)
        if folder is not None:
            monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
        if fine:
            Identity.load(identity)
            load_private(tunnel)
        else:
            with pytest.raises(BadInput, match="lets others read it"):
                Identity.load(identity)
            with pytest.raises(KeyFileError, match="others may read"):
                load_private(tunnel)
