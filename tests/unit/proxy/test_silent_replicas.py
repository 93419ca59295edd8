"""How long a client waits for a replica that says nothing more in the middle of a stream."""

import time
from typing import Final

from tests.support.answers import read, same
from tests.support.lateness import lateness
from tests.support.waiting import wait_until
from tests.unit.proxy.rig import Rig
from tests.unit.proxy.test_stream_failover import CHAT, alone, failovers, request, sims

GOING_ON_S: Final = 0.05
"""From leaving a replica to the first byte of the next one, which begins at once."""


async def test_a_frozen_replica_is_left() -> None:
    """Silence in mid-stream is a loss like any other: the client waits a quarter second longer.

    The longest wait is measured at the client, so it includes whatever the next replica needs to
    go on.
    """
    asked = request(CHAT, max_tokens=200)
    silence_s, sweep_s = 0.5, 0.25
    spec = {"inter_byte_timeout_s": silence_s}
    async with sims() as (first, second), Rig(first, second, spec=spec) as rig:
        wanted = await alone(second, CHAT, asked)
        await first.suffer(kind="slow", factor=50)  # so that there is time to freeze it
        parts: list[bytes] = []
        longest_s = late_s = 0.0
        async with lateness() as late, rig.http.stream("POST", CHAT, json=asked) as answer:
            chunks = answer.aiter_raw()
            parts.append(await anext(chunks))
            await first.suffer(kind="freeze")
            heard_s, late_then_s = time.monotonic(), late.total_s
            async for part in chunks:
                now_s = time.monotonic()
                if now_s - heard_s > longest_s:
                    longest_s, late_s = now_s - heard_s, late.total_s - late_then_s
                heard_s, late_then_s = now_s, late.total_s
                parts.append(part)
        same(read(b"".join(parts)), wanted)
        print(f"\nlongest wait {longest_s:.3f} s, of which the loop was late {late_s:.3f} s")  # noqa: T201 - figures for the reader
        assert longest_s > silence_s - GOING_ON_S - late_s, "it was left before its time"
        assert longest_s <= silence_s + sweep_s + GOING_ON_S + late_s
        assert failovers(rig, "exact") == 1
        await wait_until(rig.idle)
