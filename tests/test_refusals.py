"""Every call by which a verifier can refuse evidence has refused some: in tests, by name.

`refusals` notes where each refusal comes from while test_attest.py and test_policy.py run. Run after them, in
one process, this file asks what it noted; run alone, it runs them first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import refusals

TESTS = Path(__file__).parent
FILES = ("test_attest.py", "test_policy.py")
#: Calls that no evidence of ours reaches, and why.
OUT_OF_REACH = {
    "trail.read_canonical_cbor step": "cbor2 encodes whatever it has decoded: for a version that will not",
}


def pytest_sessionfinish() -> None:
    """As a plugin of a process of its own: hand over what was noted."""
    print("reached:", json.dumps(sorted(refusals.reached)))


@pytest.fixture
def reached(request: pytest.FixtureRequest) -> set[refusals.Place]:
    ran = {item.path.name for item in request.session.items}
    alone = "PYTEST_XDIST_WORKER" not in os.environ  # else another process may have run them
    if (
        alone
        and set(FILES) <= ran
        and not request.config.option.keyword
        and not request.config.option.markexpr
    ):
        return refusals.reached
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "test_refusals",
        "-p",
        "no:xdist",
        *(f"tests/{f}" for f in FILES),
    ]
    done = subprocess.run(
        words,
        cwd=TESTS.parent,
        env={k: v for k, v in os.environ.items() if "XDIST" not in k} | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    line = next(each for each in done.stdout.splitlines() if "reached: " in each)
    return {tuple(each) for each in json.loads(line.partition("reached: ")[2])}


def test_every_call_that_can_refuse_has_refused(reached: set[refusals.Place], shared_dir: Path) -> None:
    places = refusals.places()
    assert len(places) > 250
    missed = {name for name, place in places.items() if place not in reached}
    assert missed == set(OUT_OF_REACH), sorted(missed ^ set(OUT_OF_REACH))
    # What refuses is known: no refusal comes from a form of call that is not counted.
    assert reached <= set(places.values())
