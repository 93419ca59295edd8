"""A mesh of one thread that behaves as a drill expects: real Redis, and everything else pretended.

Proxies answer streams, members beat, a leader leads, an agent carries out wishes, and replicas
follow the declared revision. So the whole of a drill runs within seconds, without one engine.
"""

import asyncio
import contextlib
import os
import threading
from types import TracebackType
from typing import Self

import msgspec

from services.cli.readiness import ReplicaState
from shared.admin import AdminServer, Answer, json_answer
from shared.errors import RegistryError
from shared.models.deployment import Deployment, DeploymentSpec, EngineKind, EngineSpec
from shared.models.drill import DrillAct
from shared.models.event import Event
from shared.models.host import Host, Member, MemberKind
from shared.models.replica import Replica
from shared.registry import Registry, open_registry
from shared.registry.leadership import Leading
from shared.registry.replicas import ReplicaBeat
from shared.registry.results import Fence
from shared.settings import CommonSettings

MODEL, HOST, LEADER = "m", "h1", "c1"
GEN = 7
S = ReplicaState


class PretendedMesh:
    """Use as a context manager: the mesh is whole when it is entered."""

    def __init__(self, settings: CommonSettings, *, flaw: str = "", lease_ms: int = 5000) -> None:
        self._settings = settings
        self._lease_ms = lease_ms
        self._flaw = flaw
        """`cut`: streams end early once a replica was struck. `short`: a replica is missing.
        `refuse`: the agent carries out nothing."""
        self._ready = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._struck = False
        self._number = 0

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join(20)

    async def _run(self) -> None:
        registry = await open_registry(self._settings)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(registry.aclose)
            members = [
                self._member(MemberKind.CONTROLLER, LEADER),
                self._member(MemberKind.CONTROLLER, "c2"),
                self._member(MemberKind.AGENT, HOST),
            ]
            for name in ("p0", "p1"):
                server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
                await stack.enter_async_context(server)
                admin = await stack.enter_async_context(_admin(name))
                port = server.sockets[0].getsockname()[1]
                made = self._member(MemberKind.PROXY, name)
                url = f"http://127.0.0.1:{port}"
                members.append(msgspec.structs.replace(made, url=url, admin_url=admin.url))
            await self._declare(registry)
            while not self._over.is_set():
                with contextlib.suppress(RegistryError):
                    await self._turn(registry, members)
                    self._ready.set()
                await asyncio.sleep(0.1)

    def _member(self, kind: MemberKind, name: str) -> Member:
        return Member(kind=kind, id=name, host=HOST, pid=os.getpid(), version="0", started_ms=1)

    async def _declare(self, registry: Registry) -> None:
        spec = DeploymentSpec(name=MODEL, engine=EngineSpec(kind=EngineKind.SIM, model="sim/m"))
        assert await registry.fleet.declare(
            MODEL, Deployment(spec=spec, generation=1, replicas=2), 0
        )
        await registry.fleet.put_host(
            Host(host=HOST, address="127.0.0.1", cpus=1, memory_bytes=1, drills_allowed=True)
        )
        for _ in range(1 if self._flaw == "short" else 2):
            await self._new_replica(registry, spec.revision())

    async def _turn(self, registry: Registry, members: list[Member]) -> None:
        for member in members:
            await registry.fleet.beat(member)
            if member.kind is MemberKind.PROXY:
                await registry.ledger.beat(MODEL, member.id)
        await registry.leadership.try_lead(LEADER, self._lease_ms)
        revision = (await registry.fleet.deployments())[MODEL].spec.revision()
        snapshot = await registry.replicas.snapshot(MODEL)
        living = [r for r in snapshot.replicas.values() if r.state is not S.FAILED]
        await registry.replicas.heartbeat(MODEL, [ReplicaBeat(rid=r.rid, gen=GEN) for r in living])
        for replica in living:
            if replica.revision != revision:
                await registry.replicas.patch(
                    replica.rid, MODEL, gen=GEN, patch={"revision": revision}, fence=None
                )
        if len(living) < 2 and self._flaw != "short":
            await self._new_replica(registry, revision)
        await self._carry_out(registry)

    async def _carry_out(self, registry: Registry) -> None:
        wish = await registry.drills.take(HOST)
        if wish is None:
            return
        if self._flaw == "refuse":
            await registry.fleet.emit(
                Event(kind="DrillRefused", subject=f"drill/{wish.id}", message="not today")
            )
            return
        self._struck = True
        steps = {
            DrillAct.KILL: (S.READY, S.FAILED),
            DrillAct.FREEZE: (S.READY, S.UNHEALTHY),
            DrillAct.THAW: (S.UNHEALTHY, S.READY),
        }
        expect, to = steps[wish.act]
        await registry.replicas.transition(
            wish.rid, MODEL, gen=GEN, expect=expect, to=to, fence=None
        )
        await registry.fleet.emit(
            Event(kind="DrillStruck", subject=f"drill/{wish.id}", message=wish.act.value)
        )

    async def _new_replica(self, registry: Registry, revision: str) -> None:
        self._number += 1
        leading = await registry.leadership.try_lead(LEADER, self._lease_ms)
        assert isinstance(leading, Leading)
        replica = Replica(
            rid=f"r{self._number}",
            model=MODEL,
            gen=GEN,
            state=S.PENDING,
            host=HOST,
            revision=revision,
            kind=EngineKind.SIM,
        )
        await registry.replicas.create(Fence(leading.epoch, LEADER), replica)
        for expect, to in ((S.PENDING, S.STARTING), (S.STARTING, S.READY)):
            await registry.replicas.transition(
                replica.rid, MODEL, gen=GEN, expect=expect, to=to, fence=None
            )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Closed however it ends: the mesh may end, and with it this task, in mid-stream.
        with (
            contextlib.closing(writer),
            contextlib.suppress(OSError, asyncio.IncompleteReadError),
        ):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            asked = msgspec.json.decode(await reader.readexactly(length))
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            count = asked["max_tokens"]
            text = asked["messages"][0]["content"][:4]
            for number in range(count):
                if self._flaw == "cut" and self._struck and number == 3:
                    writer.transport.abort()
                    return
                finish = "length" if number == count - 1 else None
                choice = {"delta": {"content": f"{text}{number} "}, "finish_reason": finish}
                _event(writer, {"choices": [choice]})
                await writer.drain()
                await asyncio.sleep(0.005)
            _event(writer, {"choices": [], "usage": {"completion_tokens": count}})
            _chunk(writer, b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
            await writer.drain()


def _event(writer: asyncio.StreamWriter, content: object) -> None:
    _chunk(writer, b"data: " + msgspec.json.encode(content) + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def _admin(name: str) -> AdminServer:
    counted = {"ok": 0}

    def metrics() -> Answer:
        counted["ok"] += 3
        text = (
            f'redmesh_proxy_requests_total{{model="{MODEL}",outcome="2xx"}} {counted["ok"]}\n'
            f'redmesh_proxy_stream_events_total{{model="{MODEL}"}} {counted["ok"] * 20}\n'
            f'redmesh_proxy_ledger_away{{model="{MODEL}"}} 0\n'
        )
        return Answer(text.encode(), content_type="text/plain")

    live = {"proxy": name}
    return AdminServer(
        "127.0.0.1", 0, {"/metrics": metrics, "/live/requests": lambda: json_answer(live)}
    )
