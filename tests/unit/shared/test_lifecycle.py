import asyncio
import os
import signal

import pytest

from shared.lifecycle import Loops, every, run_until_stopped, stop_signals


async def test_leaving_cancels_and_awaits_every_loop() -> None:
    """When the owner leaves, no task of it is left running."""
    started = asyncio.Event()
    ended = asyncio.Event()

    async def body() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with Loops() as loops:
        task = loops.start("body", body())
        await started.wait()
    assert ended.is_set()
    assert task.done()


async def test_a_loop_that_swallows_a_cancellation_ends_too() -> None:
    """A cancellation lost inside a library is repeated, so that no loop outlives its owner."""
    started = asyncio.Event()
    swallowed: list[str] = []

    async def body() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed.append("once")
        await asyncio.Event().wait()

    async with Loops() as loops:
        task = loops.start("stubborn", body())
        await started.wait()
    assert swallowed == ["once"]
    assert task.cancelled()


async def test_a_failed_loop_brings_the_service_down() -> None:
    """An unexpected error in a loop is raised to whoever runs the service."""

    async def body() -> None:
        message = "boom"
        raise ValueError(message)

    async with Loops() as loops:
        loops.start("body", body())
        with pytest.raises(ValueError, match="boom"):
            await run_until_stopped(asyncio.Event(), loops)


async def test_sigterm_ends_the_run_in_peace() -> None:
    """SIGTERM sets the stop event and the run returns without an error."""
    async with Loops() as loops:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(5):
                await run_until_stopped(stop, loops)
    assert stop.is_set()


async def test_a_wake_cuts_the_wait_short() -> None:
    """A woken loop acts at once instead of after its interval."""
    acts: list[int] = []
    third = asyncio.Event()
    wake = asyncio.Event()

    async def act() -> None:
        acts.append(1)
        if len(acts) == 3:
            third.set()
        else:
            wake.set()

    async with Loops() as loops, asyncio.timeout(5):
        loops.start("ticks", every(lambda: 60.0, act, wake=wake))
        await third.wait()
    assert len(acts) == 3
