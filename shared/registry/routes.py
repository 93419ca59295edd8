"""Hints that routes changed, by publish and subscribe: fast, at most once, never trusted alone.

A hint carries the version before and after the change. A reader that has another version, or has
just (re)subscribed, reads the snapshot. A half-open connection shows nothing, so a PING goes over
the subscription itself, and silence after it counts as loss.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import msgspec
import redis.asyncio.client
import structlog

from shared.models.replica import Replica
from shared.registry.connection import TROUBLES, Connection
from shared.registry.keys import Keys
from shared.registry.results import text_of, whole_number

PING_INTERVAL_S: Final = 2.0
ANSWER_DEADLINE_S: Final = 2.0
BACKOFF_S: Final = (0.1, 2.0)
EVERYTHING: Final = "*"

_log = structlog.get_logger(__name__)


class RouteHint(msgspec.Struct, frozen=True, kw_only=True):
    """One replica's record changed from version `prev` to `ver`; None: it was deleted.

    `rid` is `*` when the whole model must be read again.
    """

    model: str
    prev: int
    ver: int
    rid: str
    replica: Replica | None


class RoutesReset(msgspec.Struct, frozen=True):
    """Hints may have been lost: read the snapshot of every model again."""


class Routes:
    """The stream of hints."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys
        self._decoder = msgspec.json.Decoder(Replica)

    async def hints(self) -> AsyncGenerator[RouteHint | RoutesReset]:
        """Yield hints for ever, and a RoutesReset after each (re)subscription.

        Whoever stops listening closes the generator (`contextlib.aclosing`), which unsubscribes.
        """
        lowest, highest = BACKOFF_S
        wait_s = lowest
        while True:
            try:
                async with self._subscribed() as subscription:
                    wait_s = lowest
                    yield RoutesReset()
                    async for hint in self._read(subscription):
                        yield hint
            except TROUBLES as error:
                reason = await self._connection.mapped(error)
                _log.warning("routes_subscription_lost", reason=str(reason))
            await asyncio.sleep(wait_s * random.uniform(0.8, 1.2))  # noqa: S311 - jitter only
            wait_s = min(highest, 2 * wait_s)

    @asynccontextmanager
    async def _subscribed(self) -> AsyncGenerator[redis.asyncio.client.PubSub]:
        subscription = self._connection.subscriber()
        try:
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                await subscription.psubscribe(self._keys.routes_pattern)
                await subscription.get_message(timeout=ANSWER_DEADLINE_S)
            yield subscription
        finally:
            await subscription.aclose()

    async def _read(
        self, subscription: redis.asyncio.client.PubSub
    ) -> AsyncIterator[RouteHint | RoutesReset]:
        asked = False
        while True:
            timeout_s = ANSWER_DEADLINE_S if asked else PING_INTERVAL_S
            message = cast(
                "dict[str, Any] | None", await subscription.get_message(timeout=timeout_s)
            )
            if message is not None:
                asked = False
                if message["type"] == "pmessage":
                    yield self._hint(text_of(message["channel"]), text_of(message["data"]))
                elif message["type"] == "psubscribe":
                    # The client library reconnected by itself: hints were lost meanwhile.
                    yield RoutesReset()
            elif asked:
                raise TimeoutError
            else:
                asked = True
                await cast("Any", subscription).ping()  # not typed

    def _hint(self, channel: str, data: str) -> RouteHint:
        model = channel.removeprefix(self._keys.routes_pattern.rstrip("*"))
        parts = data.split(" ", 3)
        replica: Replica | None = None
        try:
            prev, ver, rid, content = parts
            if content != "null":
                replica = self._decoder.decode(content)
                rid = replica.rid
        except (ValueError, msgspec.DecodeError):
            # Foreign text on our channel: whatever it meant, the snapshot has the truth.
            return RouteHint(model=model, prev=0, ver=0, rid=EVERYTHING, replica=None)
        return RouteHint(
            model=model, prev=whole_number(prev), ver=whole_number(ver), rid=rid, replica=replica
        )
