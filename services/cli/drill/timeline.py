"""Traffic second by second, from requests or from counters. Pure."""

from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

from services.cli.drill.records import Outcome, Request, Second, Traffic


def seconds_of(
    requests: Sequence[Request], tokens: Mapping[int, int], until_s: float
) -> tuple[Second, ...]:
    """Sort requests and tokens into the whole seconds of the run."""
    found: list[Second] = []
    for at_s in range(int(until_s)):
        end_s = at_s + 1
        ended = [each for each in requests if at_s <= each.ended_s < end_s]
        ttft_ms = [
            (each.first_s - each.began_s) * 1000
            for each in requests
            if each.first_s is not None and at_s <= each.first_s < end_s
        ]
        found.append(
            Second(
                at_s=at_s,
                requests=sum(each.outcome is Outcome.OK for each in ended),
                failed=sum(each.outcome is not Outcome.OK for each in ended),
                tokens=tokens.get(at_s, 0),
                ttft_ms=median(ttft_ms) if ttft_ms else None,
                in_flight=sum(each.began_s < end_s <= each.ended_s for each in requests),
            )
        )
    return tuple(found)


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of one proxy's counters, for one model."""

    ok: float = 0.0
    failed: float = 0.0
    """Answered with an error of ours or of the engines (5xx)."""
    broken: float = 0.0
    """Broken after the first byte."""
    tokens: float = 0.0
    first_bytes: float = 0.0
    first_byte_s: float = 0.0
    """Sum of times to first byte."""
    in_flight: float = 0.0
    moved: float = 0.0
    """Tries and streams that lost their replica."""


def grown(before: Counts | None, after: Counts) -> Counts:
    """Tell what was counted between two readings; a proxy that began anew counts from zero."""
    if before is None:
        return Counts(in_flight=after.in_flight)
    fresh = after.tokens < before.tokens or after.ok < before.ok
    base = Counts() if fresh else before
    return Counts(
        ok=max(0.0, after.ok - base.ok),
        failed=max(0.0, after.failed - base.failed),
        broken=max(0.0, after.broken - base.broken),
        tokens=max(0.0, after.tokens - base.tokens),
        first_bytes=max(0.0, after.first_bytes - base.first_bytes),
        first_byte_s=max(0.0, after.first_byte_s - base.first_byte_s),
        in_flight=after.in_flight,
        moved=max(0.0, after.moved - base.moved),
    )


def second_of(at_s: int, growth: Sequence[Counts]) -> Second:
    """Add up what all proxies counted in one second."""
    first_bytes = sum(each.first_bytes for each in growth)
    waited_s = sum(each.first_byte_s for each in growth)
    return Second(
        at_s=at_s,
        requests=round(sum(each.ok for each in growth)),
        failed=round(sum(each.failed + each.broken for each in growth)),
        tokens=round(sum(each.tokens for each in growth)),
        ttft_ms=1000 * waited_s / first_bytes if first_bytes else None,
        in_flight=round(sum(each.in_flight for each in growth)),
    )


def live_traffic(total: Counts) -> Traffic:
    """Sum up what was watched; clients that a dead proxy left are not in any counter."""
    ok, failed, broken = round(total.ok), round(total.failed), round(total.broken)
    return Traffic(
        driven=False,
        count=ok + failed + broken,
        ok=ok,
        failed=failed,
        broken=broken,
        own=0,
        resent=0,
        outcomes={"ok": ok, "failed": failed, "broken": broken},
    )


def added(one: Counts, other: Counts) -> Counts:
    """Add two counts; `in_flight` is the later one's."""
    sums = {
        name: getattr(one, name) + getattr(other, name)
        for name in Counts.__struct_fields__
        if name != "in_flight"
    }
    return Counts(in_flight=other.in_flight, **sums)
