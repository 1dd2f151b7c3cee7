"""One party cheats: in every kind of message, and in everything it makes on the way to one.

Whatever a party does, each honest party and each client ends with the right output or with an error, and
none ever accepts a wrong token. The sessions are whole: client input, preprocessing, online, reveal;
provisioning is at the end. Which cheats are tried is drawn from the printed seed; MIMIR_FAULTS=5 tries five
ways a kind and party instead of one or two, MIMIR_FAULTS=all tries all of them at every party (hours).
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import structlog
from session_fixture import (
    CONTENT,
    ERRORS,
    FORM,
    FROM_CLIENT,
    GPT2,
    LLAMA,
    PARTIES,
    TO_CLIENT,
    Event,
    Fault,
    Story,
    Tried,
    explore,
    survey,
)

from mimir.net.messages import Sampler

pytestmark = pytest.mark.slow

# Together they speak every kind of message; each is examined for the kinds that those before it do not have.
STORIES = {
    "llama": Story(LLAMA, ((0, 4),)),
    "gpt2": Story(GPT2, ((12,),)),
    # Next to no temperature: the k largest are taken and noise is tossed, but the best token always wins.
    "two turns, sampled": Story(LLAMA, ((3, 0), (8,)), sampler=Sampler("sample", 0.01, 3)),
    "one seed": Story(GPT2, ((12,),), sampler=Sampler("sample", 0.01, 2), one_seed=True),
}
WAYS = os.environ.get("MIMIR_FAULTS", "1")
COMPONENTS = ((0,), (1,), (0, 1))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of sessions are aborted here: their log lines say nothing new."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


events_of = functools.cache(survey)


def points(story: str, *where: str) -> list[list[Event]]:
    """Per kind that is new in this story and party, its first occurrence; frames of one round together."""
    known: set[tuple[str, str, str]] = set()
    for name, each in STORIES.items():
        if name == story:
            break
        known |= {event.kind for event in events_of(each)}
    first: dict[tuple[tuple[str, str, str], int], list[Event]] = {}
    for event in events_of(STORIES[story]):
        if event.where in where and event.kind not in known:
            group = first.setdefault((event.kind, event.sender), [event])
            if event.key == group[0].key and event not in group:
                group.append(event)
    return list(first.values())


def chosen(rng: random.Random, ways: Sequence[tuple[tuple[int, ...], str]], at: Event) -> list[Fault]:
    """As many of the ways as the environment asks for."""
    if WAYS == "all":
        return [Fault(at, to, how) for to, how in ways]
    return [Fault(at, to, how) for to, how in rng.sample(ways, min(int(WAYS), len(ways)))]


def examine(story: str, faults: Sequence[Fault], seed: int) -> list[Tried]:
    """Try them all; none may end in a wrong output."""
    expected = STORIES[story].expected
    tried = explore(STORIES[story], faults, seed)
    assert len(tried) == len(faults)
    kinds = Counter((t.fault.at.where, t.fault.at.lane) for t in tried)
    stopped = Counter((t.fault.at.where, t.fault.at.lane) for t in tried if t.aborted)
    for key, count in sorted(kinds.items()):
        print(f"{story}: {' '.join(key)}: {count} faults, {stopped[key]} aborted, the others did no harm")
    wrong = [why for t in tried if (why := t.wrong(expected))]
    assert not wrong, "\n".join(wrong)
    return tried


@pytest.mark.parametrize("story", STORIES)
def test_tampered_messages(story: str, seed: int) -> None:
    """Each kind of message between parties, from each party: altered, and sent in another form or not at all.

    To one receiver or alike to both, where both get something.
    """
    rng = random.Random(seed)
    faults = []
    for frames in points(story, "frame"):
        ends = [tuple(f.receiver for f in frames if f.size)]
        ends += [(end,) for end in ends[0] if len(ends[0]) > 1]
        faults += chosen(rng, [(to, how) for to in ends if to for how in CONTENT], frames[0])
        everyone = [(f.receiver,) for f in frames] + [tuple(f.receiver for f in frames)]
        ways = [(to, how) for to in everyone for how in FORM if to in ends or how not in SHORTER]
        faults += chosen(rng, ways, frames[0])
    for t in examine(story, faults, seed):
        assert t.aborted, f"nobody noticed: {t.fault}"


SHORTER = ("truncate", "cut word", "empty")  # no change of an empty frame


@pytest.mark.parametrize("story", STORIES)
def test_tampered_client_messages(story: str, seed: int) -> None:
    """What a party tells its client, and what it claims to have heard from it."""
    rng = random.Random(seed)
    faults = []
    for where, hows in (("to client", TO_CLIENT), ("from client", FROM_CLIENT)):
        for (event,) in points(story, where):
            ways = [((), how) for how in hows]
            faults += [Fault(event, *way) for way in (ways if event.step in CARRIES else rng.sample(ways, 2))]
    for t in examine(story, faults, seed):
        step, how = t.fault.at.step, t.fault.how
        # Of a request for a turn only the lengths count.
        harmless = how in ("repeat", "old") or step not in CARRIES or (step == "turn" and how not in ENDING)
        assert t.aborted or harmless, f"nobody noticed: {t.fault}"


ENDING = ("drop", "close")
CARRIES = ("masks", "token", "offsets", "turn")  # the rest is courtesy: nothing depends on it


@pytest.mark.parametrize("story", STORIES)
def test_lies_stood_by(story: str, seed: int) -> None:
    """A party computes with wrong values and vouches for them: what it opens, its summand of every product.

    Each kind at one party (each party if asked for more), since the formulas are alike at all three.
    """
    rng = random.Random(seed)
    groups: dict[tuple[str, str, str], list[Event]] = {}
    for (event,) in points(story, "open", "reshare"):
        groups.setdefault(event.kind, []).append(event)
    faults = []
    for kind, events in groups.items():
        assert len(events) == PARTIES
        ways = [(to, how) for to in (COMPONENTS if kind[0] == "open" else ((),)) for how in ERRORS]
        for event in events if WAYS != "1" else rng.sample(events, 1):
            faults += chosen(rng, ways, event)
    for t in examine(story, faults, seed):
        assert t.aborted, f"nobody noticed: {t.fault}"


@pytest.mark.parametrize("story", ["llama", "gpt2"])
def test_wrong_weight_shares(story: str, seed: int) -> None:
    """A party uses another component of a weight than its other holder."""
    rng = random.Random(seed)
    faults = []
    for event in events_of(STORIES[story]):
        if event.where == "weight":
            faults += chosen(rng, list(itertools.product(COMPONENTS, ERRORS)), event)
    for t in examine(story, faults, seed):
        # A bias enters at twice the scale: its topmost bits leave the ring and mean nothing.
        lost = t.fault.at.step.endswith("_b") and t.fault.how == "top bit"
        assert t.aborted or lost, f"nobody noticed: {t.fault}"
