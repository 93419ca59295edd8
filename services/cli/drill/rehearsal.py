"""One drill from its first request to its report: drive, strike, watch, heal, judge.

The order matters. Load runs and is watched before the fault, so that there is something to compare
with; whatever happens after, the fault is ended and the mesh is left as it was found.
"""

import asyncio
import contextlib
import datetime as dt
import importlib.metadata
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final

from services.cli import auditing
from services.cli.drill import judge, signs, timeline
from services.cli.drill.catalogue import Drill, Fault
from services.cli.drill.injection import Injection
from services.cli.drill.judge import Recovery
from services.cli.drill.load import Load
from services.cli.drill.options import LoadWish
from services.cli.drill.records import Budget, Mark, Sample, Second, Seen, Traffic
from services.cli.drill.report import Report
from services.cli.drill.scene import Scene
from services.cli.drill.watch import Watch
from shared.errors import RegistryError
from shared.models.event import EventLevel
from shared.models.host import MemberKind
from shared.registry import Registry

BEFORE_S: Final = 4.0
LIVE_BEFORE_S: Final = 10.0
"""How long traffic is watched before the fault: driven load, and traffic that is there anyway."""
AFTER_S: Final = 2.0
"""How long the load goes on when all is well again."""
LONGER_S: Final = 5.0
"""How much longer than its budgets a drill watches, to say by how much they were missed."""
NOTICED_S: Final = 1.0
"""How long after the fault the first audit waits."""
EMPTY_S: Final = 10.0
"""How long the ledger gets to be empty when the load is over."""
PATIENCE_S: Final = 60.0
"""How long a stream may take, beyond the fault and the model's silence limit."""

Tell = Callable[[str], None]


class Rehearsal:
    """One run of one drill. `fast` is a registry with short timeouts, for watching."""

    def __init__(
        self,
        drill: Drill,
        scene: Scene,
        injection: Injection,
        budget: Budget,
        wish: LoadWish,
        registries: tuple[Registry, Registry],
        tell: Tell,
    ) -> None:
        self._drill = drill
        self._scene = scene
        self._injection = injection
        self._budget = budget
        self._wish = wish
        self._calm, fast = registries
        self._tell = tell
        self._began_s = time.monotonic()
        self._started = dt.datetime.now().astimezone()
        self._watch = Watch(fast, scene, self._clock)
        silence_s = scene.facts().silence_s
        self._load = Load(
            [member.url for member in scene.of(MemberKind.PROXY)],
            scene.model,
            wish,
            self._clock,
            timeout_s=PATIENCE_S + drill.hold_s + silence_s,
        )
        self._marks: list[Mark] = []
        self._fault_s = 0.0
        self._heal_s: float | None = None
        self._exact_s: float | None = None
        self._unclean = ""
        self._began_ms = 0
        self._until_s = float("inf")
        """When all was well again: what Redis does while it is put back is no part of the fault."""

    async def run(self) -> Report:
        """Do it; the fault is ended whatever happens. Raises what an injector refuses."""
        try:
            return await self._run()
        except BaseExceptionGroup as group:
            raise _first(group) from group

    async def _run(self) -> Report:
        if not self._wish.live:
            self._tell("asking each prompt once, without disturbance")
            await self._load.rehearse()
        # From here on all times count: the answers before were nobody's traffic.
        self._began_s = time.monotonic()
        self._began_ms = await self._calm.replicas.server_time_ms()
        async with self._watch.running():
            try:
                async with self._traffic():
                    await self._strike()
                    await self._recover()
                    await asyncio.sleep(AFTER_S)
                    self._until_s = self._clock()
            finally:
                await self._injection.restore()
            self._tell("the load is over: the last audit")
            left = await self._emptied()
            drift = await self._last_audit()
        await self._note_events()
        return self._report(left=left, drift=drift)

    def _clock(self) -> float:
        return time.monotonic() - self._began_s

    @contextlib.asynccontextmanager
    async def _traffic(self) -> AsyncGenerator[None]:
        if self._wish.live:
            self._tell(f"watching the traffic for {LIVE_BEFORE_S:g} s before the fault")
            await asyncio.sleep(LIVE_BEFORE_S)
            yield
            return
        async with self._load.running():
            self._tell(f"load: {self._wish.told()}")
            await asyncio.sleep(BEFORE_S)
            self._load.settle()
            yield

    async def _strike(self) -> None:
        self._fault_s = self._clock()
        self._tell(f"FAULT: {self._injection.told}")
        await self._injection.strike()
        if not self._injection.lasts:
            self._heal_s = self._clock()
        self._mark(self._fault_s, "fault", self._injection.told)

    async def _recover(self) -> None:
        """Wait until all is well again, at most as long as the budgets and some more."""
        budget, drill = self._budget, self._drill
        if self._injection.lasts:
            early = drill.recovery in {Recovery.OUT, Recovery.LEADER, Recovery.ROLLED}
            hold_s = max(drill.hold_s, budget.recover_s + 5.0) if early else drill.hold_s
            await self._watch.until(
                lambda: early and self._recovered_s() is not None, max(hold_s, 0.0)
            )
            if drill.fault is Fault.LEADER_FREEZE:
                await asyncio.sleep(AFTER_S)  # the new leader acts before the old one wakes
            await self._injection.heal()
            self._heal_s = self._clock()
            self._mark(self._heal_s, "heal", "the fault is over")
            self._tell("the fault is over")
        longest_s = max(budget.recover_s, budget.whole_s, budget.drift_s) + LONGER_S
        auditing_task = asyncio.create_task(self._audit(longest_s))
        try:
            await self._watch.until(self._well, longest_s)
            await asyncio.wait({auditing_task}, timeout=budget.drift_s)
        finally:
            auditing_task.cancel()
            await asyncio.gather(auditing_task, return_exceptions=True)

    def _well(self) -> bool:
        streams = self._drill.recovery is Recovery.STREAMS
        recovered = streams or self._recovered_s() is not None
        return recovered and self._whole_s() is not None and bool(self._sign())

    async def _audit(self, longest_s: float) -> None:
        """Audit again and again until it is clean; not at once, when nobody has noticed yet."""
        until_s = self._clock() + longest_s
        await asyncio.sleep(NOTICED_S)
        while self._clock() < until_s:
            with contextlib.suppress(RegistryError):
                report = await auditing.examine(self._calm, self._scene.model)
                if not report.findings:
                    self._exact_s = self._clock()
                    return
                first = report.findings[0]
                self._unclean = f"{first.kind} {first.subject} ({first.delta:+d})"
            await asyncio.sleep(0.2)

    async def _emptied(self) -> int:
        """Wait until the ledger holds no request of ours; return what it still holds."""
        if self._wish.live:
            return 0
        left = 0
        until_s = self._clock() + EMPTY_S
        while self._clock() < until_s:
            with contextlib.suppress(RegistryError):
                totals = await self._calm.ledger.totals(self._scene.model)
                left = totals["*"].requests
                if left == 0:
                    return 0
            await asyncio.sleep(0.2)
        return left

    async def _last_audit(self) -> int:
        """Audit once more; Redis may just have moved back to where it was."""
        until_s = self._clock() + EMPTY_S
        while True:
            try:
                return len((await auditing.examine(self._calm, self._scene.model)).findings)
            except RegistryError:
                if self._clock() >= until_s:
                    raise
            await asyncio.sleep(0.2)

    def _end_s(self) -> float:
        return self._fault_s if self._heal_s is None else self._heal_s

    def _samples(self) -> list[Sample]:
        return [sample for sample in self._watch.samples if sample.at_s <= self._until_s]

    def _answers_s(self) -> float | None:
        return judge.answers_s(self._samples(), fault_s=self._fault_s)

    def _sign(self) -> str:
        """Say what has shown the fault so far."""
        evidence = signs.Evidence(
            struck=self._injection.struck,
            samples=self._samples(),
            fault_s=self._fault_s,
            heal_s=self._end_s(),
            fault_ms=self._began_ms + round(self._fault_s * 1000),
            requests=self._load.requests,
            told=self._injection.seen,
        )
        return signs.seen(self._drill.sign, evidence)

    def _recovered_s(self) -> float | None:
        how = self._drill.recovery
        from_s = judge.starts_s(how, self._fault_s, self._end_s(), self._answers_s())
        if how is not Recovery.STREAMS:
            return judge.recovered_s(how, self._injection.struck, self._samples(), from_s=from_s)
        if self._wish.live:
            return judge.flowing_s(self._watch.live.seconds, fault_s=self._fault_s)
        before = judge.traffic_of(self._load.requests, fault_s=self._fault_s, compared=False)
        usual_ms = before.ttft_before_ms[1] if before.ttft_before_ms else 0.0
        return judge.waits_over_s(
            self._load.requests,
            fault_s=self._fault_s,
            usual_s=usual_ms / 1000,
            until_s=self._clock(),
        )

    def _whole_s(self) -> float | None:
        # A dead member still beats by its last beat: only what is seen after the recovery counts.
        recovered_s = self._recovered_s()
        return judge.whole_s(self._watch.samples, from_s=max(self._end_s(), recovered_s or 0.0))

    def _mark(self, at_s: float, kind: str, text: str) -> None:
        self._marks.append(Mark(at_s=round(at_s, 3), kind=kind, text=text))

    async def _note_events(self) -> None:
        """Put what the fleet said of itself on the time line."""
        with contextlib.suppress(RegistryError):
            for event in await self._calm.fleet.events(200):
                at_s = (event.at_ms - self._began_ms) / 1000
                if at_s >= 0 and (at_s >= self._fault_s or event.level is not EventLevel.INFO):
                    self._mark(at_s, "event", f"{event.kind} {event.subject}: {event.message}")

    def _traffic_seen(self) -> tuple[Traffic, tuple[Second, ...]]:
        if self._wish.live:
            return timeline.live_traffic(self._watch.live.total), tuple(self._watch.live.seconds)
        traffic = judge.traffic_of(
            self._load.requests,
            fault_s=self._fault_s,
            struck_url=self._injection.struck.proxy_url,
            compared=self._load.compares,
        )
        last_s = max((each.ended_s for each in self._load.requests), default=0.0)
        return traffic, timeline.seconds_of(self._load.requests, self._load.tokens, last_s)

    def _report(self, *, left: int, drift: int) -> Report:
        drill, scene = self._drill, self._scene
        traffic, seconds = self._traffic_seen()
        seen = Seen(
            fault_s=self._fault_s,
            heal_s=self._end_s(),
            answers_s=self._answers_s(),
            recovered_s=self._recovered_s(),
            whole_s=self._whole_s(),
            exact_s=self._exact_s,
            unclean=self._unclean,
            drift=drift,
            left=left,
            sign=self._sign(),
            trespass=judge.trespass(self._injection.struck, self._watch.samples),
            traffic=traffic,
        )
        for at_s, kind, text in (
            (seen.recovered_s, "recovered", drill.recovery.value),
            (seen.whole_s, "whole", "the mesh is whole"),
            (seen.exact_s, "exact", "the ledger is exact"),
        ):
            if at_s is not None:
                self._mark(at_s, kind, text)
        return Report(
            drill=drill.name,
            what=drill.what,
            expects=drill.expects,
            recovery=drill.recovery.value,
            struck=self._injection.told,
            model=scene.model,
            mesh=scene.told(),
            load=self._wish.told(),
            version=importlib.metadata.version("redmesh"),
            started=self._started.isoformat(timespec="seconds"),
            length_s=round(self._clock(), 1),
            budget=self._budget,
            verdict=judge.judge(drill.recovery, drill.sign, self._budget, seen),
            seen=seen,
            seconds=seconds,
            marks=tuple(sorted(self._marks, key=lambda mark: mark.at_s)),
        )


def _first(error: BaseException) -> BaseException:
    """Give what a person is to read: load and watch are task groups, which wrap errors."""
    nested: Sequence[BaseException] = getattr(error, "exceptions", ())
    return _first(nested[0]) if nested else error
