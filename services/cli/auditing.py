"""`redmesh audit`: looks at the fleet several times and says whether its accounts agree."""

import asyncio
from typing import Final

import click
import msgspec

from services.cli import listings
from services.cli.audit import Finding, Live, ModelSample, findings_of, judge
from services.cli.observing import LiveReport, live_report, members
from services.cli.session import Session, common_options
from services.cli.tables import console, table
from shared.models.deployment import EngineKind
from shared.models.host import MemberKind
from shared.models.replica import ReplicaState
from shared.registry import Registry
from shared.registry.results import text_of, whole_number

LOOKS: Final = 4
"""Drift is what so many looks show alike; two suffice when the second shows nothing in common."""

INTERVAL_S: Final = 1.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What an audit found."""

    models: int
    replicas: int
    proxies: int
    requests: int
    findings: tuple[Finding, ...]
    looks: int


@click.command("audit")
@click.option("-m", "--model", metavar="MODEL", help="Only this model.")
@click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True
)
@common_options
def audit_command(session: Session, *, model: str | None, output: str) -> int:
    """Compare the ledger with the proxies' live requests and the engines' own counts.

    Exit code 0: they agree. 1: they do not, and what disagrees is listed. Proxies are asked on
    their admin ports: run it where those can be reached.
    """

    async def act(registry: Registry) -> int:
        report = await examine(registry, model)
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
    )


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
    keys = registry.keys.model(model)
    holders, totals, snapshot, stats, ready, weights = await asyncio.gather(
        registry.ledger.proxies(model),
        registry.ledger.totals(model),
        registry.replicas.snapshot(model),
        registry.replicas.stats(model),
        registry.connection.command("ZRANGE", keys.ready, 0, -1, "WITHSCORES"),
        registry.connection.command("HGETALL", keys.weight),
    )
    names = sorted(holders.keys() | reports.keys())
    leases = await asyncio.gather(*(registry.ledger.leases(model, name) for name in names))
    own = {
        rid
        for rid, replica in snapshot.replicas.items()
        if replica.kind is not EngineKind.EXTERNAL
        and replica.state in (ReplicaState.READY, ReplicaState.DRAINING)
    }
    return ModelSample(
        leases={name: held for name, held in zip(names, leases, strict=True) if held},
        requests={rid: total.requests for rid, total in totals.items()},
        costs={rid: total.cost_tokens for rid, total in totals.items()},
        ready=dict(_scores(ready)),
        weights={text_of(rid): text_of(weight) for rid, weight in dict(weights).items()},
        live={name: _live(report, model) for name, report in reports.items()},
        engines={rid: stat.running + stat.waiting for rid, stat in stats.items() if rid in own},
    )


def _scores(reply: list[object]) -> list[tuple[str, float]]:
    """Read members with scores: pairs or a flat list, as the protocol's version has it."""
    flat: list[object] = []
    for part in reply:
        flat += part if isinstance(part, (list, tuple)) else [part]
    return [
        (text_of(rid), float(whole_number(score)))
        for rid, score in zip(flat[::2], flat[1::2], strict=True)
    ]


def _live(report: LiveReport | None, model: str) -> dict[str, Live] | None:
    if report is None:
        return None
    return {
        request: Live(live.rid, live.cost_tokens)
        for request, live in report.requests.get(model, {}).items()
    }


def _show(report: Report) -> None:
    screen = console()
    compared = (
        f"{report.models} models, {report.replicas} ready replicas, {report.proxies} proxies, "
        f"{report.requests} requests in flight"
    )
    if not report.findings:
        screen.print(f"clean: ledger, proxies and engines agree ({compared})")
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
    screen.print(f"drift: {len(report.findings)} findings in {report.looks} looks ({compared})")
