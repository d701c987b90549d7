"""Waiting requests go together, none is lost or crossed, and one's fault is its own."""

import asyncio
import threading
import time

import pytest

from calibtrain.app.batching import Batcher, Busy


async def working(batcher, coroutine):
    task = asyncio.create_task(batcher.run())
    try:
        return await coroutine
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def make(work, **settings):
    return Batcher(work, **{"max_batch": 8, "max_waiting": 1000} | settings)


def test_every_caller_gets_its_own_result_and_batches_keep_their_size():
    sizes = []

    def work(items):
        sizes.append(len(items))
        time.sleep(0.001)
        return [-item for item in items]

    async def ask():
        batcher = make(work)
        return await working(batcher, asyncio.gather(*(batcher.submit(i) for i in range(500))))

    assert asyncio.run(ask()) == [-i for i in range(500)]
    assert max(sizes) == 8
    assert sum(sizes) == 500
    assert len(sizes) < 100


def test_a_fault_is_only_that_items():
    def work(items):
        if 3 in items:
            raise ValueError("three")
        return items

    async def ask():
        batcher = make(work)
        return await working(batcher, asyncio.gather(*(batcher.submit(i) for i in range(6)), return_exceptions=True))

    results = asyncio.run(ask())
    assert [result for result in results if not isinstance(result, ValueError)] == [0, 1, 2, 4, 5]
    assert isinstance(results[3], ValueError)


def test_results_too_few_are_an_error_not_a_crossed_reply():
    async def ask():
        batcher = make(lambda items: items[:1] if len(items) > 1 else [])
        return await working(batcher, asyncio.gather(batcher.submit(1), batcher.submit(2), return_exceptions=True))

    assert all(isinstance(result, RuntimeError) for result in asyncio.run(ask()))


def test_a_full_queue_refuses_at_once():
    async def ask():
        batcher = make(lambda items: items, max_waiting=2)
        waiting = [asyncio.create_task(batcher.submit(i)) for i in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await batcher.submit(2)
        return await working(batcher, asyncio.gather(*waiting))

    assert asyncio.run(ask()) == [0, 1]


def test_who_has_left_is_not_worked_for():
    seen, go = [], threading.Event()

    def work(items):
        go.wait(10)
        seen.extend(items)
        return items

    async def ask():
        batcher = make(work, max_batch=1, wait=0)

        async def callers():
            first, second, third = (asyncio.create_task(batcher.submit(i)) for i in range(3))
            await asyncio.sleep(0.05)
            second.cancel()
            go.set()
            return await first, await third

        return await working(batcher, callers())

    assert asyncio.run(ask()) == (0, 2)
    assert seen == [0, 2]


def test_stopping_tells_those_who_wait():
    async def ask():
        batcher = make(lambda items: time.sleep(0.3) or items, max_batch=1)
        task = asyncio.create_task(batcher.run())
        waiting = [asyncio.create_task(batcher.submit(i)) for i in range(3)]
        await asyncio.sleep(0.05)
        task.cancel()
        return await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)

    assert all(isinstance(result, asyncio.CancelledError) for result in asyncio.run(ask()))
