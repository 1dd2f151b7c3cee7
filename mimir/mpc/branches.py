"""Coroutines side by side: the n-th questions of all are answered together, so that they share a round.

Branches run one after another between rounds, in their order, whatever else they wait for: so all parties
draw randomness and take correlations in one order.
"""

from __future__ import annotations

import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class _Ask:
    question: Any


@types.coroutine
def ask(question: Any) -> Generator[Any, Any, Any]:
    """In a branch: wait until every other branch has a question too, or has ended, and for the answer."""
    return (yield _Ask(question))


async def side_by_side(
    flows: Sequence[Coroutine[Any, Any, Any]],
    answer: Callable[[Mapping[int, Any]], Awaitable[Mapping[int, Any]]],
) -> list[Any]:
    """The results of all flows. `answer` gets the questions of a round by the flows' numbers, in their order,
    and gives each its answer. If anything fails all flows are closed.
    """
    results: list[Any] = [None] * len(flows)
    waiting: Mapping[int, Any] = dict.fromkeys(range(len(flows)))
    try:
        while waiting:
            asks: dict[int, Any] = {}
            for i, got in waiting.items():
                asked, results[i] = await _advance(flows[i], got)
                if asked is not None:
                    asks[i] = asked.question
            waiting = await answer(asks) if asks else {}
    finally:
        for flow in flows:
            flow.close()
    return results


@types.coroutine
def _advance(flow: Coroutine[Any, Any, Any], got: Any) -> Generator[Any, Any, tuple[_Ask | None, Any]]:
    """Run a branch to its next question or its end; whatever else it waits for is passed on to Trio."""
    try:
        trap = flow.send(got)
        while not isinstance(trap, _Ask):
            try:
                woken = yield trap
            except BaseException as error:
                trap = flow.throw(error)
            else:
                trap = flow.send(woken)
        return trap, None
    except StopIteration as end:
        return None, end.value
