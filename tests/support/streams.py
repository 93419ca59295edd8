"""A load generator for chat streams that is cheap enough to share two cores with a whole mesh.

Each stream is read by a plain protocol that only collects what arrives; it is judged once, when it
has ended. A stream is good only if it has status 200, an intact chunked body, a finish reason,
exactly the tokens that were asked for, `[DONE]` last, and no error object: an answer that was cut
short must never pass as a success. Everything else is a failure of one kind and one phase, because
the promises of the mesh differ before and after the first byte.
"""

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from enum import StrEnum
from typing import Final, cast

import msgspec

from tests.support.verdicts import Asked, Outcome, dechunked, judge, told

_END_OF_CHUNKS: Final = b"\r\n0\r\n\r\n"
_RETRY_PAUSE_S: Final = 0.1


class Phase(StrEnum):
    """When it ended so: before or after the first byte of the answer."""

    BEFORE = "before the first byte"
    MIDWAY = "midway"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One request, judged. Times count from the first try."""

    outcome: Outcome
    phase: Phase
    port: int
    """The proxy that gave the final answer."""
    tries: int
    ttft_s: float
    total_s: float
    ended_s: float
    """When it had ended, on the monotonic clock."""
    detail: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a load came to."""

    count: int
    ok: int
    retried: int
    """Requests that a client sent again because its proxy went away before the first byte."""
    failures: Mapping[tuple[Outcome, Phase], int]
    details: Sequence[str]
    """Some of the failures in words."""
    ttft_s: Sequence[float]
    """Of good streams, sorted."""
    total_s: Sequence[float]
    reads: int
    cpu_s: float
    """CPU time of this process while the load ran."""

    @property
    def lost(self) -> int:
        """Requests that failed although not one byte of their answer had been sent."""
        return sum(n for (_, phase), n in self.failures.items() if phase is Phase.BEFORE)

    @property
    def broken(self) -> Mapping[Outcome, int]:
        """Streams that broke midway, by kind."""
        return {kind: n for (kind, phase), n in self.failures.items() if phase is Phase.MIDWAY}

    def __str__(self) -> str:
        per_read_us = self.cpu_s * 1e6 / self.reads if self.reads else 0.0
        failures = {f"{kind} {phase}": n for (kind, phase), n in self.failures.items()}
        ttft, whole = (
            f"p50 {percentile(values, 50):.3f} s p99 {percentile(values, 99):.3f} s"
            for values in (self.ttft_s, self.total_s)
        )
        return (
            f"{self.ok}/{self.count} good, {self.retried} sent again, "
            f"failures {failures or 'none'}; TTFT {ttft}; whole {whole}; "
            f"{self.reads} reads at {per_read_us:.0f} µs of our CPU"
            + "".join(f"\n  {line}" for line in self.details)
        )


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile of sorted `values`; 0 for none."""
    return values[min(len(values) - 1, len(values) * percent // 100)] if values else 0.0


class Load:
    """Chat streams of `max_tokens` tokens against the proxies on `ports`.

    With `asks`, each user asks what that says instead. The proxies are on ports of this machine,
    except those for which `hosts` names another address.

    A client keeps to its proxy and its connection as long as both work. When the proxy goes away
    before the first byte, it asks another one, for up to `patience_s`; midway it does not, for
    that is what the mesh must tell it.
    """

    def __init__(
        self,
        ports: Sequence[int],
        model: str,
        *,
        max_tokens: int,
        timeout_s: float = 60.0,
        patience_s: float = 10.0,
        hosts: Mapping[int, str] | None = None,
        compares: bool = True,
        asks: Callable[[int], Asked] | None = None,
    ) -> None:
        self._compares = compares
        self._asks = asks or self._usual
        self._ports = tuple(ports)
        self._hosts = dict(hosts or {})
        self._model = model
        self._max_tokens = max_tokens
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._idle: dict[int, list[_Connection]] = defaultdict(list)
        self._results: list[Result] = []
        self._told: dict[int, int] = {}
        """User → hash of what its answers tell."""
        self._cpu_s = time.process_time()
        self.reads = 0
        """Times that a part of an answer arrived."""
        self.active = 0
        """Requests that are in flight."""
        self.streaming = 0
        """Requests whose answer has begun and not ended."""
        self.asked: Counter[int] = Counter()
        """Port → requests that are in flight at that proxy now."""
        self.cut_off = 0
        """Tries whose connection ended before a byte of the answer came."""

    @property
    def results(self) -> Sequence[Result]:
        """Return every request that has ended so far, in order."""
        return tuple(self._results)

    @property
    def good(self) -> int:
        """Count the good ones so far."""
        return sum(1 for result in self._results if result.outcome is Outcome.OK)

    def report(self) -> Report:
        """Sum up what has ended so far."""
        good = [r for r in self._results if r.outcome is Outcome.OK]
        bad = [r for r in self._results if r.outcome is not Outcome.OK]
        return Report(
            count=len(self._results),
            ok=len(good),
            retried=sum(1 for r in self._results if r.tries > 1),
            failures=Counter((r.outcome, r.phase) for r in bad),
            details=[
                f":{r.port} {r.outcome} {r.phase} after {r.total_s:.2f} s and {r.tries} tries: "
                f"{r.detail}"
                for r in bad[:8]
            ],
            ttft_s=sorted(r.ttft_s for r in good),
            total_s=sorted(r.total_s for r in good),
            reads=self.reads,
            cpu_s=time.process_time() - self._cpu_s,
        )

    @contextlib.asynccontextmanager
    async def users(self, count: int, *, over_s: float = 1.5) -> AsyncGenerator[None]:
        """Keep `count` users busy, each with one stream after another, while the block runs.

        They come one by one within `over_s`, so that at any time some streams have just begun and
        others are midway. At the end no new stream begins, and those in flight are waited for.
        """
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for user in range(count):
                group.create_task(self._user(user, over_s * user / count, stop))
            try:
                yield
            finally:
                stop.set()
        self.close()

    async def arrivals(self, rate: float, duration_s: float) -> Sequence[int]:
        """Begin `rate` streams a second for `duration_s`, whatever becomes of the earlier ones.

        Returns how many streams were in flight, four times a second while new ones arrived.
        """
        began_s = time.monotonic()
        samples: list[int] = []
        async with asyncio.TaskGroup() as group:
            for number in range(round(rate * duration_s)):
                due_s = number / rate
                wait_s = began_s + due_s - time.monotonic()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(self.ask(number))
                if len(samples) <= due_s * 4:
                    samples.append(self.active)
        self.close()
        return samples

    async def ask(self, user: int) -> Result:
        """Ask once, as `user`, and record what came of it."""
        self.active += 1
        try:
            result = await self._ask(user)
        finally:
            self.active -= 1
        self._results.append(result)
        return result

    def close(self) -> None:
        """Close the connections that wait for a next request."""
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()

    async def _user(self, user: int, pause_s: float, stop: asyncio.Event) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause_s)
            if stop.is_set():
                return
            result = await self.ask(user)
            # After a failure a real client waits a moment too: a dead mesh must not be hammered.
            pause_s = 0.0 if result.outcome is Outcome.OK else _RETRY_PAUSE_S

    async def _ask(self, user: int) -> Result:
        began_s = time.monotonic()
        tries = 0
        while True:
            port = self._ports[(user + tries) % len(self._ports)]
            tries += 1
            connection, outcome, detail = await self._try(port, user)
            now_s = time.monotonic()
            begun = connection is not None and connection.first_s > 0
            self.cut_off += outcome is Outcome.RESET and not begun
            ends = outcome is Outcome.STATUS and '"shutting_down"' in detail
            away = ends or (outcome in {Outcome.REFUSED, Outcome.RESET} and not begun)
            if away and now_s - began_s < self._patience_s:
                if tries % len(self._ports) == 0:
                    await asyncio.sleep(_RETRY_PAUSE_S)
                continue
            first_s = connection.first_s if connection is not None and begun else now_s
            return Result(
                outcome=outcome,
                # An error that came instead of a stream is an answer none of which was sent.
                phase=Phase.MIDWAY if begun and outcome is not Outcome.STATUS else Phase.BEFORE,
                port=port,
                tries=tries,
                ttft_s=first_s - began_s,
                total_s=now_s - began_s,
                ended_s=now_s,
                detail=detail,
            )

    async def _try(self, port: int, user: int) -> "tuple[_Connection | None, Outcome, str]":
        connection: _Connection | None = None
        self.asked[port] += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connection(port)
                await connection.exchange(self._request(user))
        except TimeoutError:
            if connection is not None:
                connection.close()
            return connection, Outcome.TIMEOUT, f"nothing more for {self._timeout_s:g} s"
        except OSError as error:
            return connection, Outcome.REFUSED, str(error)
        except asyncio.CancelledError:
            if connection is not None:
                connection.close()
            raise
        finally:
            self.asked[port] -= 1
        outcome, detail = self._judge(user, connection)
        if connection.lost is not None:
            detail = f"{detail}: {connection.lost!r}"
        if connection.reusable:
            self._idle[port].append(connection)
        else:
            connection.close()
        return connection, outcome, detail

    def _judge(self, user: int, connection: "_Connection") -> tuple[Outcome, str]:
        body = connection.body
        asked = self._asks(user)
        outcome, detail = judge(connection.status, body, asked.tokens, asked.finish)
        if self._compares and outcome is Outcome.OK and body is not None:
            # Exact and each time the same question: whatever happens, there is one answer.
            said = told(body)
            if self._told.setdefault(user, hash(said)) != hash(said):
                return Outcome.DIFFERENT, f"not as before: {said.text[:200]!r} {said.rest[:200]}"
        return outcome, detail

    async def _connection(self, port: int) -> "_Connection":
        idle = self._idle[port]
        while idle:
            connection = idle.pop()
            if connection.reusable:
                return connection
        _, made = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(self), self._hosts.get(port, "127.0.0.1"), port
        )
        return made

    def _usual(self, user: int) -> Asked:
        body = (
            b'{"model":"%b","stream":true,"max_tokens":%d,"ignore_eos":true,"temperature":0,'
            b'"stream_options":{"include_usage":true},'
            b'"messages":[{"role":"user","content":"User %d asks what a mesh is."}]}'
            % (self._model.encode(), self._max_tokens, user)
        )
        return Asked(body=body, tokens=self._max_tokens)

    def _request(self, user: int) -> bytes:
        asked = self._asks(user)
        return (
            b"POST %b HTTP/1.1\r\nHost: mesh\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (asked.path.encode(), len(asked.body), asked.body)
        )


class _Connection(asyncio.Protocol):
    """One keep-alive connection to a proxy; one request at a time."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport | None = None
        self._ended: asyncio.Future[None] | None = None
        self._parts: list[bytes] = []
        self._tail = b""
        self._length_bytes: int | None = None
        self._arrived_bytes = 0
        self._headed = False
        self.first_s = 0.0
        """When the first byte of the answer came; 0 for never."""
        self.status = 0
        self.body: bytes | None = None
        """The body, with its chunks joined; None if it is not whole."""
        self.reusable = False
        self.lost: Exception | None = None
        """Why the connection ended, if by an error."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's class is none of these

    def data_received(self, data: bytes) -> None:
        load = self._load
        load.reads += 1
        if not self._parts:
            self.first_s = time.monotonic()
            load.streaming += 1
        self._parts.append(data)
        self._arrived_bytes += len(data)
        if not self._headed and not self._read_head():
            return
        if self._length_bytes is not None:
            if self._arrived_bytes >= self._length_bytes:
                self._finish()
            return
        self._tail = (self._tail + data[-7:])[-7:]
        if self._tail == _END_OF_CHUNKS:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        self.lost = exc
        if self._ended is not None and not self._ended.done():
            if self._parts:
                self._load.streaming -= 1
            self._ended.set_result(None)

    async def exchange(self, request: bytes) -> None:
        """Send `request`; return when the answer has ended or the connection has."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("closed before the request was sent")
        self._parts, self._tail, self._headed = [], b"", False
        self._length_bytes, self._arrived_bytes = None, 0
        self.first_s, self.status, self.body, self.reusable = 0.0, 0, None, False
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._ended

    def close(self) -> None:
        """Close at once; an answer in progress is given up, as by a client that goes away."""
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def _read_head(self) -> bool:
        data = b"".join(self._parts)
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return False
        self._headed = True
        head = data[:end].lower()
        self.status = int(head[9:12])
        if b"\r\ntransfer-encoding: chunked" not in head:
            _, _, rest = head.partition(b"\r\ncontent-length:")
            self._length_bytes = end + 4 + int(rest.split(b"\r\n", 1)[0] or 0)
        self._parts = [data]
        return True

    def _finish(self) -> None:
        if self._ended is None or self._ended.done():
            return
        data = b"".join(self._parts)
        body = data[data.index(b"\r\n\r\n") + 4 :]
        self.body = dechunked(body) if self._length_bytes is None else body
        self.reusable = b"\r\nconnection: close" not in data[:2048].lower()
        self._load.streaming -= 1
        self._ended.set_result(None)
