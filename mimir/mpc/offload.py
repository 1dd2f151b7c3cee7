"""Long kernels run in a thread, so that the event loop keeps time for the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import trio

T = TypeVar("T")

THREAD_WORK: Final = 1 << 19  # elementary operations from which a thread is worth its 0.1 ms


async def offload(work: int, fn: Callable[[], T]) -> T:
    """Run fn here if `work` (about so many multiplications) is small, else in a thread without the GIL."""
    if work < THREAD_WORK:
        return fn()
    return await trio.to_thread.run_sync(fn)
