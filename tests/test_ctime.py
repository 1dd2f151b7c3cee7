"""Time tells nothing: secrets tainted under a memory checker, and Welch's t-test on cycle counts.

Both tools must catch functions that leak on purpose; else their silence about the kernels proves nothing. The
checker knows no AVX-512, so that level rests on the statistics and on sharing its source with avx2. Nor does
it know VAES, and it shows its programs a processor without: what it sees of the generator at avx2 is AES-NI,
which shares its source with VAES.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import missing

from mimir import kernels
from mimir.kernels import build

HERE = Path(__file__).resolve().parent
CHECKER_LEVELS = ("ref", "avx2")
CHECKER_ERROR = 99
TRIES = 3
T_QUIET = 10.0  # a kernel must stay below this in one try of TRIES; measured: below 3
T_LEAK = 50.0  # a control must exceed this; measured: above 250
DEADLINE = 120

pytestmark = pytest.mark.slow


def names() -> list[str]:
    """The kernels in ctime.c, read from its list so that each is a test of its own."""
    table = re.search(r"#define ALL\(X\)(.*?)\n\n", (HERE / "ctime.c").read_text(), re.S)
    assert table is not None
    return re.findall(r"X\((\w+)\)", table[1])


KERNELS = [name for name in names() if not name.startswith("leaky_")]
CONTROLS = [name for name in names() if name.startswith("leaky_")]


def compiled(program: Path, *flags: str) -> Path:
    """The harness with the kernels in it, or a skip that says what is missing."""
    if platform.machine() != "x86_64":
        pytest.skip("the harness counts cycles as x86-64 does")
    if shutil.which("gcc") is None:
        missing("gcc is missing: install it (Debian: apt install gcc)")
    if not Path("/usr/include/valgrind/memcheck.h").exists():
        missing("valgrind/memcheck.h is missing: install valgrind (Debian: apt install valgrind)")
    sources = [HERE / "ctime.c", *(build.HERE / name for name in build.SOURCES)]
    command = ["gcc", *build.FLAGS, "-g", *flags, f"-I{build.HERE}", "-o", str(program), *map(str, sources)]
    subprocess.run([*command, "-lm"], check=True, timeout=DEADLINE)
    return program


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("ctime") / "ctime")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-error")
    return compiled(tmp_path_factory.mktemp("sanitized") / "ctime", *flags)


def taint(harness: Path, level: str, name: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("valgrind") is None:
        missing("valgrind is missing: install it (Debian: apt install valgrind)")
    command = ["valgrind", "--quiet", f"--error-exitcode={CHECKER_ERROR}", "--track-origins=no", str(harness)]
    command += ["taint", str(kernels.LEVELS.index(level)), name]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)


def welch(harness: Path, level: str, name: str) -> float:
    command = [str(harness), "time", str(kernels.LEVELS.index(level)), name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=True)
    return float(run.stdout)


def test_every_kernel_is_in_the_harness() -> None:
    source = (HERE / "ctime.c").read_text()
    header = build.declarations((build.HERE / "kernels.h").read_text())
    declared = set(re.findall(r"\b(mk_(?!level|threads)\w+)\(", header))
    assert declared <= set(re.findall(r"\bmk_\w+", source))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("at", [name for name in CHECKER_LEVELS if name in kernels.available()])
def test_no_branch_or_address_depends_on_a_secret(harness: Path, at: str, kernel: str) -> None:
    run = taint(harness, at, kernel)
    assert run.returncode == 0 and "uninitialised" not in run.stderr, run.stderr


@pytest.mark.parametrize("control", CONTROLS)
def test_checker_catches_a_leak(harness: Path, control: str) -> None:
    run = taint(harness, "ref", control)
    assert run.returncode == CHECKER_ERROR and "uninitialised" in run.stderr, run.stderr


@pytest.mark.parametrize("kernel", KERNELS)
def test_cycles_tell_nothing(harness: Path, level: str, kernel: str) -> None:
    seen: list[float] = []
    while len(seen) < TRIES:
        seen.append(welch(harness, level, kernel))
        if seen[-1] < T_QUIET:
            return
    pytest.fail(f"{kernel} at {level}: |t| = {seen}, at least {T_QUIET} in each try")


@pytest.mark.parametrize("control", CONTROLS)
def test_statistics_catch_a_leak(harness: Path, control: str) -> None:
    assert max(welch(harness, "ref", control) for _ in range(TRIES)) > T_LEAK


def test_sanitizers_find_nothing(sanitized: Path, level: str) -> None:
    """Undefined behaviour and stray addresses: the same calls, under the sanitizers of gcc."""
    for name in KERNELS:
        command = [str(sanitized), "taint", str(kernels.LEVELS.index(level)), name]
        run = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        assert run.returncode == 0, f"{name}: {run.stderr}"
