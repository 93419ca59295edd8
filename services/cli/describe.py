"""`redmesh describe`: one thing, whole, with its recent events."""

from typing import Any, Final

import click
import msgspec

from services.cli import observing
from services.cli.declaring import find
from services.cli.listings import held, remark
from services.cli.observing import all_replicas
from services.cli.session import Session, common_options
from services.cli.tables import age, console, table
from shared.errors import InvalidInputError, NotFoundError
from shared.models.host import MemberKind
from shared.registry import Registry

EVENTS_SHOWN: Final = 10
KINDS: Final = ("deployment", "replica", "host", "proxy", "controller")


def parse(words: tuple[str, ...]) -> tuple[str, str]:
    """Read `KIND NAME` or `KIND/NAME`; a model's name may contain slashes itself."""
    kind, _, name = words[0].partition("/") if len(words) == 1 else (words[0], "", words[1])
    singular = "proxy" if kind == "proxies" else kind.removesuffix("s")
    if singular not in KINDS or not name:
        raise InvalidInputError(
            f"expected KIND/NAME with KIND one of {', '.join(KINDS)}, given {' '.join(words)!r}",
            field="KIND",
        )
    return singular, name


@click.command("describe")
@click.argument("words", metavar="KIND/NAME", nargs=-1, required=True)
@common_options
def describe_command(session: Session, *, words: tuple[str, ...]) -> int:
    """Show a deployment, replica, host, proxy or controller, and what happened to it lately."""
    if len(words) > 2:
        raise InvalidInputError(f"expected KIND/NAME, given {' '.join(words)!r}", field="KIND")
    kind, name = parse(words)

    async def act(registry: Registry) -> int:
        name_found, record, related = await _read(registry, kind, name)
        screen = console()
        screen.print(f"{kind}/{name_found}", style="bold", markup=False)
        for line in _lines(record):
            screen.print(line, markup=False, soft_wrap=True)
        now_ms = await registry.replicas.server_time_ms()
        subjects = {f"{kind}/{name_found}", *related}
        events = [e for e in await registry.fleet.events(2000) if e.subject in subjects]
        rows = [
            (age(now_ms - each.at_ms), each.kind, remark(each)) for each in events[-EVENTS_SHOWN:]
        ]
        screen.print("\nevents", style="bold")
        if rows:
            screen.print(table(("AGO", "KIND", "WHAT"), rows, wraps="WHAT"))
        else:
            screen.print("none")
        return 0

    return session.run(act)


async def _read(
    registry: Registry, kind: str, name: str
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Read a record; returns its name, its content and the subjects whose events belong to it."""
    if kind == "deployment":
        deployment = await find(registry, name)
        model = deployment.spec.name
        rids = tuple((await registry.replicas.snapshot(model)).replicas)
        record = _plain(deployment)
        record["running"] = {
            replica.rid: f"{replica.state} on {replica.host}"
            for replica in (await registry.replicas.snapshot(model)).replicas.values()
        }
        return model, record, tuple(f"replica/{rid}" for rid in rids)
    if kind == "replica":
        return name, await _replica(registry, name), ()
    if kind == "host":
        return name, await _host(registry, name), (f"agent/{name}",)
    wanted = MemberKind(kind)
    found = {
        seen.member.id: seen
        for seen in (await registry.fleet.members()).values()
        if seen.member.kind is wanted
    }
    if name not in found:
        raise _unknown(kind, name, list(found))
    record = _plain(found[name].member)
    record["seen_ms_ago"] = found[name].seen_ms_ago
    if wanted is MemberKind.CONTROLLER:
        record["leads"] = await observing.leader_of(registry) == name
    return name, record, ()


async def _replica(registry: Registry, rid: str) -> dict[str, Any]:
    found = {replica.rid: replica for replica in await all_replicas(registry)}
    if rid not in found:
        raise _unknown("replica", rid, list(found))
    replica = found[rid]
    record = _plain(replica)
    pulse = await registry.replicas.pulse(replica.model)
    load = (await registry.ledger.totals(replica.model)).get(rid)
    record["reserved"] = {
        "requests": load.requests if load else 0,
        "cost_tokens": load.cost_tokens if load else 0,
    }
    if rid in pulse.stats:
        record["engine"] = _plain(pulse.stats[rid])
    if rid in pulse.beats_ms:
        record["beat_ms_ago"] = pulse.now_ms - pulse.beats_ms[rid]
    return record


async def _host(registry: Registry, name: str) -> dict[str, Any]:
    hosts = await registry.fleet.hosts()
    if name not in hosts:
        raise _unknown("host", name, list(hosts))
    record = _plain(hosts[name])
    record["hold"] = held((await registry.fleet.holds()).get(f"host:{name}")) or "none"
    record["replicas"] = {
        replica.rid: f"{replica.state}"
        for replica in await all_replicas(registry)
        if replica.host == name
    }
    record["orders"] = {
        rid: f"{order.action} {order.model}"
        for rid, order in (await registry.fleet.orders(name)).items()
    }
    return record


def _unknown(kind: str, name: str, known: list[str]) -> NotFoundError:
    listed = ", ".join(sorted(known)) or "none"
    return NotFoundError(f"there is no {kind} {name!r}; there are: {listed}")


def _plain(record: msgspec.Struct) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(record)
    return plain


def _lines(record: dict[str, Any], indent: int = 2) -> list[str]:
    lines: list[str] = []
    for field, value in record.items():
        blank = " " * indent
        if isinstance(value, dict) and value:
            lines += [f"{blank}{field}:", *_lines(value, indent + 2)]  # pyright: ignore[reportUnknownArgumentType] - builtins made from a struct
        elif value not in (None, "", [], {}, ()):
            shown = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            lines.append(f"{blank}{field}: {shown}")
    return lines
