"""How late an event loop is: what a busy machine adds to every time that is measured in it."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Final

TICK_S: Final = 0.005
USUAL_S: Final = 0.002
"""As late as any timer may be."""


class Lateness:
    """What was lost so far to moments in which the loop did not run."""

    def __init__(self) -> None:
        self.total_s = 0.0

    async def watch(self) -> None:
        """Measure for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            late_s = loop.time() - due_s
            if late_s > USUAL_S:
                self.total_s += late_s


@contextlib.asynccontextmanager
async def lateness() -> AsyncGenerator[Lateness]:
    """Measure while the block runs."""
    measured = Lateness()
    watching = asyncio.create_task(measured.watch())
    try:
        yield measured
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
