"""Requests that wait together go through the model together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Busy(Exception):
    """As many requests wait as may; come back later."""


class Batcher(Generic[Item, Result]):
    """Runs `work` in one thread of its own, on up to `max_batch` items that came within `wait` seconds of the first.

    `work` maps a list to a list of as many results, in order. Where it fails on several items it is tried on each alone,
    so that one request's fault is not another's. Items whose caller has gone are dropped before they are worked on.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        max_batch: int,
        max_waiting: int,
        wait: float = 0.005,
    ) -> None:
        self.work = work
        self.max_batch = max_batch
        self.wait = wait
        self.queue: asyncio.Queue[tuple[Item, asyncio.Future[Result]]] = asyncio.Queue(max_waiting)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def submit(self, item: Item) -> Result:
        """The result of one item. Raises Busy, or what `work` raised on this item."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        try:
            self.queue.put_nowait((item, future))
        except asyncio.QueueFull:
            raise Busy from None
        return await future

    async def run(self) -> None:
        """Work until cancelled; who still waits then is told so."""
        try:
            while True:
                batch = await self._gather()
                if batch:
                    await self._answer(batch)
        finally:
            while not self.queue.empty():
                self.queue.get_nowait()[1].cancel()
            self.thread.shutdown(wait=False, cancel_futures=True)

    async def _gather(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch = [await self.queue.get()]
        if self.queue.qsize() < self.max_batch - 1:
            await asyncio.sleep(self.wait)
        while len(batch) < self.max_batch and not self.queue.empty():
            batch.append(self.queue.get_nowait())
        return [(item, future) for item, future in batch if not future.done()]

    async def _answer(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            items = [item for item, _ in batch]
            results = await loop.run_in_executor(self.thread, self.work, items)
            if len(results) != len(items):
                raise RuntimeError(f"{len(items)} items in, {len(results)} results out")
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as error:
            if len(batch) == 1:
                if not batch[0][1].done():
                    batch[0][1].set_exception(error)
                return
            for pair in batch:
                if not pair[1].done():
                    await self._answer([pair])
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)
