"""A Redis with its failures, and clients that reach it over a network with its own.

The clients below stand where redis-py's stand: the registry's real `Connection` works on them. A
command may be refused, lost, executed late (when its caller has given up on it long ago), executed
twice (by the client library's own retry), or executed without its reply ever arriving.
"""

import asyncio
import hashlib
from collections.abc import Callable
from random import Random
from typing import Any, Final, cast

import redis.exceptions

from shared.registry.clients import HOT_TIMEOUT_S, TIMEOUT_S
from tests.simulation.luahost import LuaHost
from tests.simulation.store import Store
from tests.simulation.virtual import Process, Timeline

EPOCH_MS: Final = 1_790_000_000_000


LATE_S: Final = 2.5
"""No command is executed later than this after it was sent: what the network holds is bounded."""

Command = tuple[str, ...]


class Node:
    """One Redis server."""

    def __init__(self, store: Store, skew_ms: float) -> None:
        self.store = store
        self.skew_ms = skew_ms
        self.up = True
        self.frozen = False
        self.replica = False
        """A demoted primary: it answers, but takes no writes."""
        self.scripts: set[str] = set()
        self.backlog: list[Callable[[], None]] = []
        self.subscribers: list[PubSub] = []


class Watch:
    """What a simulation wants to know of each command that was executed."""

    def executed(self, node: Node, client: "Client", command: Command, reply: object) -> None:
        """Look at the data after a command."""

    def sending(self, client: "Client", command: Command) -> None:
        """Look at a command before it leaves."""

    def answered(self, client: "Client", command: Command, reply: object) -> None:
        """Look at an answer that has just reached its process."""


class RedisWorld:
    """The primary of the moment, and everybody's way to it."""

    def __init__(self, timeline: Timeline, host: LuaHost, random: Random) -> None:
        self.timeline = timeline
        self.host = host
        self.random = random
        self.watch = Watch()
        self.executions = 0
        self.history = hashlib.blake2b(digest_size=8)
        self.calm_from_s = 0.0
        """When the last fault of any kind ends or has ended."""
        self.clock_steps_ms: list[float] = []
        """How the server's clock was set, one after the other."""
        self.primary = self._node(Store(), 0.0)

    def _node(self, store: Store, skew_ms: float) -> Node:
        node = Node(store, skew_ms)
        store.now_ms = lambda: EPOCH_MS + self.timeline.now_s * 1000 + node.skew_ms
        store.publish = lambda channel, message: self._publish(node, channel, message)
        return node

    # faults

    def trouble(self, until_s: float) -> None:
        """Note that a fault lasts until then."""
        self.calm_from_s = max(self.calm_from_s, until_s)

    def freeze(self, for_s: float) -> None:
        """Stop the server (SIGSTOP): what arrives is executed when it goes on."""
        node = self.primary
        node.frozen = True
        self.trouble(self.timeline.now_s + for_s)

        def thaw() -> None:
            node.frozen = False
            backlog, node.backlog = node.backlog, []
            self.random.shuffle(backlog)  # many sockets are ready at once
            for run in backlog:
                run()

        self.timeline.after(for_s, thaw)

    def restart(self, for_s: float, *, keep: bool) -> None:
        """Kill the server; it comes back with its data, or empty."""
        old = self.primary
        old.up = False
        self.trouble(self.timeline.now_s + for_s)

        def back() -> None:
            self._promote(old.store.copied() if keep else Store(), old.skew_ms)

        self.timeline.after(for_s, back)

    def fail_over(self, lag_s: float, for_s: float, *, planned: bool) -> None:
        """Promote a replica that is `lag_s` behind; a planned one leaves the old primary up."""
        copies: list[Store] = []
        old = self.primary
        self.timeline.after(0.0, lambda: copies.append(old.store.copied()))
        self.trouble(self.timeline.now_s + lag_s + for_s)

        def fall() -> None:
            if self.primary is not old:
                return
            if planned:
                old.replica = True
            else:
                old.up = False
            self.timeline.after(for_s, rise)

        def rise() -> None:
            if self.primary is old:
                self._promote(copies[0], old.skew_ms)

        self.timeline.after(lag_s, fall)

    def step_clock(self, by_ms: float) -> None:
        """Set the server's clock."""
        self.clock_steps_ms.append(by_ms)
        self.primary.skew_ms += by_ms
        self.trouble(self.timeline.now_s)

    def forget_scripts(self) -> None:
        """Do what SCRIPT FLUSH does."""
        self.primary.scripts.clear()

    def _promote(self, store: Store, skew_ms: float) -> None:
        old, self.primary = self.primary, self._node(store, skew_ms)
        for subscriber in old.subscribers:
            subscriber.lost()

    # the network

    def send(self, client: "Client", command: Command, future: "asyncio.Future[Any]") -> None:
        """Carry a command to the client's server and its answer back, as the network allows."""
        link, pick = client.link, self.random
        self.watch.sending(client, command)
        if link.cut or pick.random() < link.lose_request:
            return
        delay_s = link.latency_s(pick)
        node = client.node

        def deliver() -> None:
            if not node.up:
                self._answer(client, command, future, redis.exceptions.ConnectionError("refused"))
            elif node.frozen:
                node.backlog.append(deliver)
            else:
                self._execute(node, client, command, future)

        held_s = max(0.0, link.held_until_s - self.timeline.now_s)
        if pick.random() < link.late:
            # The kernel sends it again and again: it arrives when its caller has given up on it.
            delay_s += client.timeout_s + pick.uniform(0.0, LATE_S)
            self.trouble(self.timeline.now_s + delay_s)
        self.timeline.after(held_s + delay_s, deliver)

    def _execute(
        self,
        node: Node,
        client: "Client",
        command: Command,
        future: "asyncio.Future[Any]",
        *,
        again: bool = False,
    ) -> None:
        reply: Any
        try:
            reply = self._run(node, command)
        except redis.exceptions.RedisError as error:
            reply = error
        self.executions += 1
        now_s = self.timeline.now_s
        self.history.update(f"{now_s:.6f} {client.name} {command} {reply}\n".encode())
        if not isinstance(reply, Exception):
            self.watch.executed(node, client, command, reply)
        lost = client.link.cut or self.random.random() < client.link.lose_reply
        if not again and not lost:
            self._answer(client, command, future, reply)
        if self.random.random() < client.link.twice and not again:
            delay_s = self.random.uniform(0.0, 1.0)
            self.trouble(now_s + delay_s)
            self.timeline.after(
                delay_s, lambda: self._execute(node, client, command, future, again=True)
            )

    def _run(self, node: Node, command: Command) -> Any:  # noqa: ANN401 - any reply
        node.store.expire()
        name, *parts = command
        if name not in {"EVALSHA", "EVAL"}:
            if name == "PING":
                return b"PONG"
            reply = node.store.call(name, *parts)
            return _raw(reply)
        sha = hashlib.sha1(parts[0].encode()).hexdigest() if name == "EVAL" else parts[0]  # noqa: S324 - Redis' own
        if name == "EVAL":
            node.scripts.add(sha)
        elif sha not in node.scripts:
            raise redis.exceptions.NoScriptError("NOSCRIPT No matching script.")
        if node.replica:
            raise redis.exceptions.ReadOnlyError("You can't write against a read only replica.")
        return self.host.run(sha, node.store, int(parts[1]), parts[2:])

    def _answer(
        self, client: "Client", command: Command, future: "asyncio.Future[Any]", reply: object
    ) -> None:
        def arrive() -> None:
            if future.done():
                return
            self.watch.answered(client, command, reply)
            if isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)

        delay_s = client.link.latency_s(self.random) + client.link.answers_late_s
        self.timeline.after(delay_s, lambda: client.process.post(arrive))

    def _publish(self, node: Node, channel: str, message: str) -> None:
        for subscriber in node.subscribers:
            subscriber.published(channel, message)


class Link:
    """The network between one process and Redis."""

    def __init__(self) -> None:
        self.mend()

    def mend(self) -> None:
        """Be a good network again."""
        self.slow_ms = 0.3
        """Mean time of one way, about."""
        self.held_until_s = 0.0
        """Until then what is sent waits in the sender's buffers, and then arrives after all."""
        self.cut = False
        self.answers_late_s = 0.0
        self.lose_request = 0.0
        self.lose_reply = 0.0
        self.late = 0.0
        self.twice = 0.0
        """Share of commands that are executed a second time soon after."""

    def latency_s(self, random: Random) -> float:
        """Draw the time of one way."""
        return self.slow_ms / 1000 * random.uniform(0.3, 2.0)


class _Pool:
    """What `Connection` drops when it meets a demoted primary."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    async def disconnect(self, *, inuse_connections: bool) -> None:
        """Resolve the address again."""
        del inuse_connections
        self._client.node = self._client.world.primary


class Client:
    """One client of the client library, in one process."""

    def __init__(
        self, world: RedisWorld, process: Process, link: Link, *, hot: bool, name: str = ""
    ) -> None:
        self.world = world
        self.process = process
        self.link = link
        self.name = name or process.name
        self.node = world.primary
        self.timeout_s = HOT_TIMEOUT_S if hot else TIMEOUT_S
        self.connection_pool = _Pool(self)
        self._retries = 0 if hot else 2

    async def execute_command(self, *parts: str | bytes | int) -> Any:  # noqa: ANN401 - any reply
        """Send one command; retry as the library is told to."""
        command = tuple(part.decode() if isinstance(part, bytes) else str(part) for part in parts)
        for attempt in range(self._retries + 1):
            try:
                return await self._once(command)
            except (redis.exceptions.TimeoutError, redis.exceptions.ConnectionError):
                if attempt == self._retries:
                    raise
                await asyncio.sleep(0.05)
        return None

    async def _once(self, command: Command) -> Any:  # noqa: ANN401 - any reply
        if not self.node.up:
            self.node = self.world.primary  # a broken connection is made anew
        loop = self.process.loop
        future: asyncio.Future[Any] = loop.create_future()
        timer = loop.call_later(self.timeout_s, self._late, future)
        self.world.send(self, command, future)
        try:
            return await future
        finally:
            timer.cancel()

    def _late(self, future: "asyncio.Future[Any]") -> None:
        if not future.done():
            future.set_exception(redis.exceptions.TimeoutError("no answer"))

    def pubsub(self) -> "PubSub":
        """Open a subscription."""
        return PubSub(self)

    async def aclose(self) -> None:
        """Nothing to close."""


class PubSub:
    """A subscription, as far as `shared.registry.routes` uses one."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._node: Node | None = None
        self._queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def psubscribe(self, pattern: str) -> None:
        """Subscribe to everything."""
        del pattern
        await self._client.execute_command("PING")
        self._node = self._client.node
        self._node.subscribers.append(self)
        self._queue.put_nowait({"type": "psubscribe"})

    async def get_message(self, timeout: float) -> dict[str, Any] | None:  # noqa: ASYNC109 - the library's name
        """Wait for a message."""
        try:
            async with asyncio.timeout(timeout):
                message = await self._queue.get()
        except TimeoutError:
            return None
        if message is None:
            raise redis.exceptions.ConnectionError("connection closed")
        return message

    async def ping(self) -> None:
        """Ask whether anybody is there."""
        await self._client.execute_command("PING")
        self._queue.put_nowait({"type": "pong"})

    async def aclose(self) -> None:
        """End it."""
        if self._node is not None and self in self._node.subscribers:
            self._node.subscribers.remove(self)

    def published(self, channel: str, message: str) -> None:
        """Carry a message here, unless the network is down."""
        if self._client.link.cut:
            return
        content = {"type": "pmessage", "channel": channel, "data": message}
        world = self._client.world
        delay_s = self._client.link.latency_s(world.random)
        world.timeline.after(
            delay_s, lambda: self._client.process.post(lambda: self._queue.put_nowait(content))
        )

    def lost(self) -> None:
        """Tell that the server is gone."""
        self._client.process.post(lambda: self._queue.put_nowait(None))


def _raw(reply: object) -> object:
    if isinstance(reply, tuple):
        return [_raw(part) for part in cast("tuple[object, ...]", reply)]
    if isinstance(reply, str):
        return reply.encode()
    return None if reply is False else reply
