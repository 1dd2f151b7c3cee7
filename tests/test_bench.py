"""The benchmarks' own arithmetic, on models too small to measure anything."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reference import Fixed, FixedModel, FloatModel, nats_per_token
from session_fixture import GPT2, LLAMA, tiny_plan

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import perplexity

WINDOW = 8
IDS = np.random.default_rng(5).integers(0, 16, 5 * WINDOW + 1).tolist()


@pytest.mark.parametrize("spec", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_perplexities_are_those_of_the_two_models(spec: object) -> None:
    plan = tiny_plan(spec)  # type: ignore[arg-type]
    got = perplexity.perplexity(plan, IDS, WINDOW, Fixed())
    want = nats_per_token(FloatModel(plan), IDS, WINDOW, 5 * WINDOW)
    assert got["tokens"] == 5 * WINDOW and got["windows_outside"] == 0
    assert got["float64"] == pytest.approx(np.exp(want))
    assert got["percent"] == pytest.approx(100 * (got["fixed"] / got["float64"] - 1))
    assert 0 < abs(got["percent"]) < perplexity.TARGET


def test_a_coarser_scale_shows() -> None:
    """Or the comparison would compare a model with itself."""
    plan = tiny_plan(LLAMA)
    fine, coarse = (
        perplexity.perplexity(plan, IDS, WINDOW, replace(Fixed(), scale_bits=bits)) for bits in (16, 13)
    )
    assert coarse["largest_window_percent"] > 1.5 * fine["largest_window_percent"]


def test_windows_that_leave_the_range_are_counted_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = FixedModel.forward
    calls = 0

    def third_fails(self: FixedModel, ids: list[int]) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OverflowError("3.softmax: too far")
        return forward(self, ids)

    monkeypatch.setattr(FixedModel, "forward", third_fails)
    plan = tiny_plan(LLAMA)
    got = perplexity.perplexity(plan, IDS, WINDOW, Fixed())
    kept = [nats_per_token(FloatModel(plan), IDS[i * WINDOW :], WINDOW, WINDOW) for i in (0, 1, 3, 4)]
    assert got["tokens"] == 4 * WINDOW and got["windows_outside"] == 1
    assert got["outside"] == ["3.softmax: too far"]
    assert got["float64"] == pytest.approx(np.exp(np.mean(kept)))
