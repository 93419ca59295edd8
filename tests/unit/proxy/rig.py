"""A proxy in the test's own event loop: real server and relay, a ledger and engines of the test."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import httpx
import msgspec

from services.proxy.api.hot import HotRoutes
from services.proxy.app import build_app
from services.proxy.beats import Beats
from services.proxy.metrics import Metrics
from services.proxy.pool import Endpoints
from services.proxy.resume.api import StreamRoutes
from services.proxy.resume.room import StreamRoom
from services.proxy.resume.writing import Streams
from services.proxy.server import bind, make_server
from services.proxy.serving import Fleet, Served
from services.proxy.settings import ProxySettings
from services.proxy.table import Tables
from shared.errors import RegistryError, RegistryUnavailableError
from shared.models.deployment import Deployment, DeploymentSpec, EngineKind, EngineSpec
from shared.models.replica import Replica, ReplicaState
from shared.models.routing import Beat, Lease, ModelSpec, Snapshot
from shared.registry.ledger import (
    BUSY,
    MAX_CANDIDATES,
    NONE,
    Adopt,
    BatchReply,
    OnBatchReply,
    Op,
    ReapReply,
    RecountReply,
    Release,
    Reserve,
)
from shared.secret import Secret
from tests.support.waiting import wait_until

MODEL = "demo"


def replica(rid: str, url: str, **fields: object) -> Replica:
    """Make the record of a READY replica."""
    base = Replica(
        rid=rid,
        model=MODEL,
        gen=1,
        state=ReplicaState.READY,
        host="h",
        revision="r",
        kind=EngineKind.SIM,
        url=url,
    )
    return msgspec.structs.replace(base, **fields)


def deployment(name: str = MODEL, replicas: int = 1, **fields: object) -> Deployment:
    """Make a declared model."""
    spec = DeploymentSpec(
        name=name, aliases=("org/Demo-1B",), engine=EngineSpec(kind=EngineKind.SIM)
    )
    return msgspec.structs.replace(Deployment(spec=spec, generation=1, replicas=replicas), **fields)


def snapshot(
    replicas: Sequence[Replica], ver: int = 10, *, epoch: int | None = 1, **spec: object
) -> Snapshot:
    """Make a snapshot of the model."""
    base = ModelSpec(
        model=MODEL, aliases=("org/Demo-1B",), desired_replicas=len(replicas), epoch=epoch
    )
    return Snapshot(
        model=MODEL,
        ver=ver,
        spec=msgspec.structs.replace(base, **spec),
        replicas={one.rid: one for one in replicas},
    )


class MemoryLedger:
    """A ledger in memory: least requests first, the first of equals; can fail on request."""

    def __init__(self, ready: Mapping[str, Replica]) -> None:
        self.ready = ready
        self.held: dict[str, Lease] = {}
        self.batches: list[list[Op]] = []
        self.ver = 10
        self.error: RegistryError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.open = asyncio.Event()
        self.open.set()
        self.lose_reply = False
        self.known = True
        self.silent: list[str] = []
        self.reaped: list[str] = []
        self.recounts = 0
        self.wrong_totals = 0

    def submit(self, model: str, proxy: str, ops: Sequence[Op], on_reply: OnBatchReply) -> None:
        """Apply operations in order, as soon as it is open."""
        assert (model, proxy) == (MODEL, "px")
        self.batches.append(list(ops))
        task = asyncio.get_running_loop().create_task(self._answer(ops, on_reply))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, ops: Sequence[Op], on_reply: OnBatchReply) -> None:
        await self.open.wait()
        if self.error is not None and not self.lose_reply:
            on_reply(self.error)
            return
        reply = BatchReply(self.ver, [self._apply(op) for op in ops])
        on_reply(self.error or reply)

    def _apply(self, op: Op) -> str | bool:
        if isinstance(op, Release):
            return self.held.pop(op.request, None) is not None
        if isinstance(op, Adopt):
            self._hold(op.request, op.rid, op.cost_tokens)
            return True
        if op.request in self.held:
            return self.held[op.request].rid
        heeded = op.exclude[-MAX_CANDIDATES:]
        counts = {rid: 0 for rid in self.ready if rid not in heeded}
        if not counts:
            return NONE
        for lease in self.held.values():
            if lease.rid in counts:
                counts[lease.rid] += 1
        rid = min(counts, key=lambda rid: counts[rid])
        if counts[rid] >= self.ready[rid].max_requests:
            return BUSY
        self._hold(op.request, rid, op.cost_on(rid))
        return rid

    def _hold(self, request: str, rid: str, cost_tokens: int) -> None:
        self.held[request] = Lease(request=request, rid=rid, cost_tokens=cost_tokens)

    async def beat(self, model: str, proxy: str, waiting: int = 0) -> Beat:
        """Count the leases."""
        del model, proxy
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return Beat(
            leases=len(self.held),
            ver=self.ver,
            known=self.known,
            waiting_total=waiting,
            silent=len(self.silent),
        )

    async def leases(self, model: str, proxy: str) -> dict[str, Lease]:
        """Read the leases."""
        del model, proxy
        return dict(self.held)

    async def suspects(self, model: str) -> list[str]:
        """Name the silent."""
        del model
        return self.silent

    async def reap(self, model: str, proxy: str) -> ReapReply:
        """Drop, in two rounds."""
        del model
        self.reaped.append(proxy)
        return ReapReply(100, 1 if len(self.reaped) < 2 else 0, alive=False)

    async def recount(self, model: str, holders: Sequence[str]) -> RecountReply:
        """Count how often it was asked."""
        del model, holders
        self.recounts += 1
        return RecountReply(self.wrong_totals, len(self.held))

    def reserves(self) -> list[Reserve]:
        """Give every reserve that was asked for."""
        return [op for batch in self.batches for op in batch if isinstance(op, Reserve)]


class NoJournals:
    """Redis as a proxy finds it that has none: no stream is resumable."""

    async def _away(self, *_: Any, **__: Any) -> Any:  # noqa: ANN401 - never gives anything
        raise RegistryUnavailableError("no Redis")

    open = append = known = read = claim = close = _away


class HasUrl(Protocol):
    """A replica: all that the proxy needs to know of it."""

    url: str


class Rig:
    """A running proxy before some engines. Use as an async context manager."""

    def __init__(
        self, *engines: HasUrl, spec: Mapping[str, Any] | None = None, **settings: object
    ) -> None:
        base = ProxySettings(fleet_secret=Secret("fleet"), port=0)
        self.settings = msgspec.structs.replace(base, **settings)
        self.engines = engines
        self.spec = dict(spec or {})
        self.tables = Tables()
        self.replicas = [
            replica(f"demo-{number}", engine.url) for number, engine in enumerate(engines)
        ]
        self.ver = 10
        self.stale: list[str] = []
        self.not_ready: str | None = None
        self.no_metrics = False
        self.journals: Streams = NoJournals()
        """Where resumable streams are kept; to be set before the proxy runs."""
        self.lane = True
        """Take usual requests beneath ASGI; to be set before the proxy runs."""

    async def __aenter__(self) -> Self:
        source = random.Random(7)
        wanted = max(1, len(self.engines))
        self.tables.apply_catalogue({MODEL: deployment(replicas=wanted)}, 0.0)
        self.tables.catalogued = True
        self.metrics = Metrics()
        self.tables.apply_snapshot(self._snapshot())
        table = self.tables.get(MODEL)
        assert table is not None
        self.table = table
        self.ledger = MemoryLedger({})
        self.ledger.ready = table.ready
        self.endpoints = Endpoints(
            self.settings.fleet_secret,
            {},
            idle_s=self.settings.replica_idle_s,
            connect_timeout_s=self.settings.connect_timeout_s,
        )
        self.fleet = Fleet(
            proxy="px",
            settings=self.settings,
            tables=self.tables,
            ledger=self.ledger,
            endpoints=self.endpoints,
            metrics=self.metrics,
            random=source,
            saw_version=self.stale.append,
        )
        self.beats = Beats(
            proxy="px",
            fleet=self.fleet,
            ledger=self.ledger,
            metrics=self.metrics,
            random=source,
        )
        self.room = StreamRoom(self.fleet, self.journals)
        streams = StreamRoutes(self.room)
        hot = HotRoutes(self.fleet, streams)
        app = build_app(
            self.fleet,
            hot,
            streams,
            version="0",
            ready=lambda: self.not_ready,
            metrics=self._exposed,
        )
        listening = bind("127.0.0.1", 0)
        self.port: int = listening.getsockname()[1]
        self.server = make_server(app, self.settings, hot if self.lane else None)
        loop = asyncio.get_running_loop()
        self._serving = loop.create_task(self.server.serve(sockets=[listening]))
        self._loops = [
            loop.create_task(self.fleet.run_sweeps()),
            loop.create_task(self.fleet.run_polls()),
            loop.create_task(self.server.sweep_connections()),
        ]
        await wait_until(lambda: self.server.started)
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=20)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.http.aclose()
        await self.room.aclose()
        self.fleet.shut()
        self.server.should_exit = True
        await self._serving
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await self.fleet.aclose(deadline_s=1)

    @property
    def served(self) -> Served:
        """The model, as it is served."""
        return self.fleet.of(self.table)

    def change(self, *replicas: Replica) -> None:
        """Change the routing table to these replicas, in the ledger too."""
        self.replicas = list(replicas)
        self.ver += 1
        self.ledger.ver = self.ver
        self.ledger.ready = {one.rid: one for one in replicas if one.state is ReplicaState.READY}
        self.tables.apply_snapshot(self._snapshot())

    async def _exposed(self) -> bytes:
        if self.no_metrics:
            raise ConnectionRefusedError
        return b"# metrics\n"

    def _snapshot(self) -> Snapshot:
        spec = {"desired_replicas": max(1, len(self.replicas)), **self.spec}
        return snapshot(self.replicas, self.ver, **spec)

    async def chat(self, *, stream: bool = False, **fields: object) -> httpx.Response:
        """Send a chat request and read the whole answer."""
        return await self.http.post("/v1/chat/completions", json=chat(stream=stream, **fields))

    async def raw(
        self,
        body: bytes,
        path: str = "/v1/chat/completions",
        content_type: str = "application/json",
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request on a connection of one's own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {content_type}\r\n"
            f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await writer.drain()
        return reader, writer

    def idle(self) -> bool:
        """Tell whether nothing is in flight, and nothing held in the ledger."""
        return self.fleet.in_flight() == 0 and not self.ledger.held


def chat(*, stream: bool = False, **fields: object) -> dict[str, Any]:
    """Make a chat request."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "stream": stream,
        **fields,
    }
