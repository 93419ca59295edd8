"""`redmesh audit`: looks at the fleet several times and says whether its accounts agree.

`--repair` mends what the ledger itself can know: totals are worked out anew from the leases, and
what dead proxies hold is dropped as their peers would drop it. Both are safe at any moment and
under any load. What a proxy knows better, the proxy mends with its beats; an engine is never
touched.
"""

import asyncio
from collections.abc import Iterable
from typing import Final

import click
import msgspec

from services.cli import listings
from services.cli.audit import (
    ADVICE,
    COUNTED,
    Finding,
    Kind,
    Live,
    ModelSample,
    findings_of,
    judge,
)
from services.cli.observing import LiveReport, live_report, members
from services.cli.session import Session, common_options
from services.cli.tables import console, table
from shared.models.deployment import EngineKind
from shared.models.host import MemberKind
from shared.models.replica import ReplicaState
from shared.registry import Registry
from shared.registry.ledger import GRACE_MS

LOOKS: Final = 4
"""Drift is what so many looks show alike; two suffice when the second shows nothing in common."""

INTERVAL_S: Final = 1.0

REPORTED_MS: Final = 5000
"""An engine's report that is older proves nothing: its agent is away."""

REAP_TRIES: Final = 12


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What an audit found."""

    models: int
    replicas: int
    proxies: int
    requests: int
    findings: tuple[Finding, ...]
    looks: int
    unheard: tuple[str, ...] = ()
    """Replicas whose engines could not be compared: their agents have not reported them lately."""
    repaired: tuple[str, ...] = ()
    """What a repair changed, for a person."""


@click.command("audit")
@click.option("-m", "--model", metavar="MODEL", help="Only this model.")
@click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True
)
@click.option(
    "--repair",
    is_flag=True,
    help="Work out wrong totals anew from the leases, and drop what dead proxies hold; then look "
    "again. Safe at any time and under load.",
)
@common_options
def audit_command(session: Session, *, model: str | None, output: str, repair: bool) -> int:
    """Compare the ledger with the proxies' live requests and the engines' own counts.

    Exit code 0: they agree, maybe after --repair. 1: they do not, and what disagrees is listed with
    what it means. Proxies are asked on their admin ports: run it where those can be reached.
    """

    async def act(registry: Registry) -> int:
        report = await examine(registry, model)
        if repair and report.findings:
            repaired = await mend(registry, report.findings)
            report = msgspec.structs.replace(await examine(registry, model), repaired=repaired)
        if output == "json":
            click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2))
        else:
            _show(report)
        return 1 if report.findings else 0

    return session.run(act)


async def examine(registry: Registry, model: str | None = None) -> Report:
    """Look until nothing is left that every look shows, at most `LOOKS` times."""
    looks = [await look(registry, model)]
    if findings_of(looks[0]):
        while len(looks) < LOOKS and judge(looks):
            await asyncio.sleep(INTERVAL_S)
            looks.append(await look(registry, model))
    last = looks[-1]
    return Report(
        models=len(last),
        replicas=sum(len(sample.ready) for sample in last.values()),
        proxies=len({proxy for sample in last.values() for proxy in sample.live}),
        requests=sum(len(live or {}) for sample in last.values() for live in sample.live.values()),
        findings=tuple(judge(looks)),
        looks=len(looks),
        unheard=tuple(rid for _, sample in sorted(last.items()) for rid in sample.unheard),
    )


async def mend(registry: Registry, findings: Iterable[Finding]) -> tuple[str, ...]:
    """Mend what can be mended from here, and tell what was changed."""
    wrong = {finding.model for finding in findings if finding.kind in COUNTED}
    held = {
        (finding.model, finding.subject)
        for finding in findings
        if finding.kind is Kind.LEASE_OF_UNKNOWN_PROXY
    }
    done: list[str] = []
    for model in sorted(wrong | {model for model, _ in held}):
        reply = await registry.ledger.recount(model, await _holders(registry, model))
        if reply.corrected:
            done.append(
                f"{model}: {reply.corrected} totals and scores worked out anew from "
                f"{reply.requests} reservations"
            )
    for model, proxy in sorted(held):
        dropped = await _reap(registry, model, proxy)
        if dropped:
            done.append(f"{model}: {dropped} reservations of {proxy} dropped, which is gone")
    return tuple(done)


async def _reap(registry: Registry, model: str, proxy: str) -> int:
    """Drop what a silent proxy holds; as everywhere, only after it was marked for a while."""
    dropped = 0
    for _ in range(REAP_TRIES):
        if proxy in await registry.ledger.suspects(model):
            reply = await registry.ledger.reap(model, proxy)
            dropped += reply.dropped
            while reply.left > 0:
                reply = await registry.ledger.reap(model, proxy)
                dropped += reply.dropped
        if not await registry.ledger.leases(model, proxy):
            break
        await asyncio.sleep(GRACE_MS / 1000 / 2)
    return dropped


async def _holders(registry: Registry, model: str) -> set[str]:
    """Name every proxy that may hold reservations: those that beat, and all that are known."""
    known = {
        seen.member.id
        for seen in (await registry.fleet.members()).values()
        if seen.member.kind is MemberKind.PROXY
    }
    return known | (await registry.ledger.proxies(model)).keys()


async def look(registry: Registry, only: str | None) -> dict[str, ModelSample]:
    """Look once at every model. Proxies and ledger are read close together, model by model."""
    proxies = await members(registry, MemberKind.PROXY)
    samples: dict[str, ModelSample] = {}
    models = await listings.models(registry, only)
    answers = await asyncio.gather(
        *(live_report(proxy) for proxy in proxies), return_exceptions=True
    )
    reports = {
        proxy.id: answer if isinstance(answer, LiveReport) else None
        for proxy, answer in zip(proxies, answers, strict=True)
    }
    for model in models:
        samples[model] = await _sample(registry, model, reports)
    return samples


async def _sample(
    registry: Registry, model: str, reports: dict[str, LiveReport | None]
) -> ModelSample:
    names = await _holders(registry, model) | reports.keys()
    books, snapshot, pulse = await asyncio.gather(
        registry.ledger.books(model, names),
        registry.replicas.snapshot(model),
        registry.replicas.pulse(model),
    )
    own = {
        rid
        for rid, replica in snapshot.replicas.items()
        if replica.kind is not EngineKind.EXTERNAL
        and replica.state in (ReplicaState.READY, ReplicaState.DRAINING)
    }
    engines = {
        rid: stat.running + stat.waiting
        for rid, stat in pulse.stats.items()
        if rid in own and pulse.now_ms - stat.at_ms <= REPORTED_MS
    }
    return ModelSample(
        leases=books.leases,
        requests=books.requests,
        costs=books.costs,
        ready=books.ready,
        weights=books.weights,
        live={name: _live(report, model) for name, report in reports.items()},
        engines=engines,
        unheard=tuple(sorted(own - engines.keys())),
    )


def _live(report: LiveReport | None, model: str) -> dict[str, Live] | None:
    if report is None:
        return None
    return {
        request: Live(live.rid, live.cost_tokens)
        for request, live in report.requests.get(model, {}).items()
    }


def _show(report: Report) -> None:
    screen = console()
    for line in report.repaired:
        screen.print(f"repaired: {line}")
    compared = (
        f"{report.models} models, {report.replicas} ready replicas, {report.proxies} proxies, "
        f"{report.requests} requests in flight"
    )
    if report.unheard:
        screen.print(
            f"not compared: {len(report.unheard)} engines, of which no agent has reported for "
            f"{REPORTED_MS // 1000} s: {', '.join(report.unheard)}. See `redmesh get hosts`",
            highlight=False,
        )
    if not report.findings:
        whom = "ledger and proxies" if report.unheard else "ledger, proxies and engines"
        heard = "; so do the engines that were heard" if report.unheard else ""
        screen.print(f"clean: {whom} agree{heard} ({compared})")
        return
    screen.print(
        table(
            ("MODEL", "WHAT", "WHERE", "OFF BY", "WHY"),
            [
                (each.model, each.kind, each.subject[:24], f"{each.delta:+d}", each.text)
                for each in report.findings
            ],
            wraps="WHY",
        )
    )
    for kind in sorted({each.kind for each in report.findings}):
        screen.print(f"{kind}: {ADVICE[kind]}.", highlight=False)
    screen.print(f"drift: {len(report.findings)} findings in {report.looks} looks ({compared})")
