"""What every test may ask for: one printed seed, the shared checkpoints, and each kernel level in turn.

The seed is fresh unless MIMIR_TEST_SEED sets it; it also seeds Hypothesis. The shared checkpoints lie beside
the repository in `shared/`, or where MIMIR_SHARED says; without them the tests that need them are skipped,
but fail where CI=true.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

SEED_VARIABLE = "MIMIR_TEST_SEED"
SHARED_VARIABLE = "MIMIR_SHARED"
REPOSITORY = Path(__file__).resolve().parent.parent

_seed = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads its option
def pytest_configure(config: pytest.Config) -> None:
    seed = int(os.environ.get(SEED_VARIABLE) or secrets.randbits(32))
    config.stash[_seed] = seed
    os.environ[SEED_VARIABLE] = str(seed)  # for the workers that run files side by side
    if getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = str(seed)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.write_line(f"seed: {SEED_VARIABLE}={config.stash[_seed]}")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """64 bits for this test alone, derived from the printed seed and the test's name."""
    text = f"{request.config.stash[_seed]} {request.node.nodeid}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def find_shared() -> Path | None:
    """The directory with the shared checkpoints, if this machine has it."""
    chosen = os.environ.get(SHARED_VARIABLE)
    at = Path(chosen) if chosen else REPOSITORY.parent / "shared"
    return at if (at / "models" / "MODELS.json").is_file() else None


def missing(why: str) -> NoReturn:
    """Skip a test that needs what is not here; where CI=true it must be here."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """`shared/`, with models/MODELS.json in it."""
    found = find_shared()
    if found is None:
        missing(
            f"the shared checkpoints are not beside the repository; set {SHARED_VARIABLE} to their directory"
        )
    return found


@pytest.fixture(scope="session")
def shared_models(shared_dir: Path) -> dict[str, Any]:
    """MODELS.json by model name; `path` is added to each."""
    listed = json.loads((shared_dir / "models" / "MODELS.json").read_text("utf-8"))["models"]
    return {m["name"]: m | {"path": shared_dir / "models" / m["directory"]} for m in listed}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "level" in metafunc.fixturenames:
        from mimir import kernels

        metafunc.parametrize("level", kernels.available(), indirect=True)


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once at each kernel level of this machine."""
    from mimir import kernels

    before = kernels.level()
    kernels.force(request.param)
    yield request.param
    kernels.force(before)
