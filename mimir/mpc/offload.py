"""Long work in threads: apart from the event loop, which keeps time for the mesh, and on several cores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Final, TypeVar

import trio

from mimir import kernels

T = TypeVar("T")

THREAD_WORK: Final = 1 << 19  # elementary operations from which a thread is worth its 0.1 ms


async def offload(work: int, fn: Callable[[], T]) -> T:
    """Run fn here if `work` (about so many multiplications) is small, else in a thread without the GIL."""
    if work < THREAD_WORK:
        return fn()
    return await trio.to_thread.run_sync(fn)


def spread(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Results of jobs in their order, made by as many threads as kernels may use; by this one if that is one.

    For jobs of several kernels each, from 0.2 ms on. `jobs` itself runs on this thread and may be ahead of
    the results by twice as many as there are threads; jobs must not need what comes of earlier results.
    """
    count = kernels.threads()
    if count == 1:
        yield from (job() for job in jobs)
        return
    workers, running = _workers(count), deque[Future[T]]()
    for job in jobs:
        running.append(workers.submit(job))
        if len(running) == 2 * count:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


@cache  # two threads that ask first at the same time get one each; that of the first is soon gone
def _workers(count: int) -> ThreadPoolExecutor:
    """Threads whose kernels are not split again."""
    return ThreadPoolExecutor(count, "mimir-kernels", kernels.alone)
