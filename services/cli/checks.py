"""What `redmesh doctor` checks, one function a subject. Judging is pure: facts are arguments.

Each check says what it found and, unless all is well, what to do about it.
"""

import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final

import msgspec

from services.cli.observing import ALIVE_MS
from shared.models.deployment import Deployment
from shared.models.host import MemberKind
from shared.models.replica import Replica, ReplicaState
from shared.registry.fleet import MemberSeen
from shared.wording import listed

OLDEST_PYTHON: Final = (3, 11)
OLDEST_REDIS: Final = (6, 2)
SLOW_REDIS_MS: Final = 5.0
LARGEST_SKEW_MS: Final = 1000
LEAST_DISK_BYTES: Final = 5 << 30
LEAST_SHM_BYTES: Final = 1 << 30


class Verdict(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    """Works, but not well, or not for long."""
    FAIL = "fail"
    SKIP = "skip"
    """Could not be checked here."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One check's result."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


def python(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """Judge the Python that runs us."""
    found = ".".join(map(str, version))
    if version >= OLDEST_PYTHON:
        return Check(name="python", verdict=Verdict.OK, found=found)
    return Check(
        name="python", verdict=Verdict.FAIL, found=found, remedy="use Python 3.11 or newer"
    )


def redis_version(info: Mapping[str, str]) -> Check:
    """Judge the server's version from `INFO server`."""
    text = info.get("redis_version", "")
    name = "Valkey" if "valkey_version" in info else "Redis"
    shown = f"{name} {info.get('valkey_version', text)}"
    parts = text.split(".")
    known = len(parts) >= 2 and parts[0].isdigit() and parts[1].isdigit()
    if not known:
        return Check(name="redis version", verdict=Verdict.SKIP, found="INFO does not say")
    if (int(parts[0]), int(parts[1])) >= OLDEST_REDIS:
        return Check(name="redis version", verdict=Verdict.OK, found=shown)
    return Check(
        name="redis version",
        verdict=Verdict.FAIL,
        found=shown,
        remedy="use Redis 6.2 or newer, or Valkey",
    )


def latency(samples_ms: Sequence[float]) -> Check:
    """Judge round trips to Redis by their median: each reservation needs one."""
    median_ms = sorted(samples_ms)[len(samples_ms) // 2]
    found = f"{median_ms:.2f} ms (median of {len(samples_ms)})"
    if median_ms <= SLOW_REDIS_MS:
        return Check(name="redis latency", verdict=Verdict.OK, found=found)
    return Check(
        name="redis latency",
        verdict=Verdict.WARN,
        found=found,
        remedy="put Redis near the proxies; beyond 100 ms they route without it",
    )


def eviction(info: Mapping[str, str]) -> Check:
    """Judge the eviction policy from `INFO memory`: an evicted key is a lost reservation."""
    policy = info.get("maxmemory_policy", "")
    limited = info.get("maxmemory", "0") != "0"
    if not policy:
        return Check(name="redis eviction", verdict=Verdict.SKIP, found="INFO does not say")
    if policy == "noeviction" or not limited:
        return Check(name="redis eviction", verdict=Verdict.OK, found=policy)
    return Check(
        name="redis eviction",
        verdict=Verdict.FAIL,
        found=f"{policy}, with a memory limit",
        remedy="set maxmemory-policy noeviction: an evicted key is a lost reservation",
    )


def clock_skew(before_ms: int, redis_ms: int, after_ms: int) -> Check:
    """Judge this machine's clock against Redis', asked between `before_ms` and `after_ms`."""
    skew_ms = max(before_ms - redis_ms, redis_ms - after_ms, 0)
    if skew_ms <= LARGEST_SKEW_MS:
        return Check(name="clock", verdict=Verdict.OK, found=f"{skew_ms} ms from Redis'")
    return Check(
        name="clock",
        verdict=Verdict.WARN,
        found=f"{skew_ms} ms from Redis'",
        remedy="run an NTP client on both machines; ages that you see are wrong until then",
    )


def leader(owner: str, members: Mapping[str, MemberSeen]) -> Check:
    """Judge whether somebody leads, and whether somebody could take over."""
    alive = [
        seen.member.id
        for seen in members.values()
        if seen.member.kind is MemberKind.CONTROLLER and seen.seen_ms_ago < ALIVE_MS
    ]
    if owner and alive:
        standbys = len([each for each in alive if each != owner])
        if standbys:
            found = f"{owner}, {standbys} standing by"
            return Check(name="leader", verdict=Verdict.OK, found=found)
        return Check(
            name="leader",
            verdict=Verdict.WARN,
            found=f"{owner}, nobody stands by",
            remedy="start a second `redmesh controller`",
        )
    return Check(
        name="leader",
        verdict=Verdict.FAIL,
        found="nobody leads",
        remedy="start `redmesh controller`; if one runs, see its log (`redmesh logs controller-0`)",
    )


def agents(hosts: Sequence[str], members: Mapping[str, MemberSeen]) -> Check:
    """Judge whether every registered host has an agent that beats."""
    silent = [
        host
        for host in hosts
        if (seen := members.get(f"{MemberKind.AGENT}:{host}")) is None
        or seen.seen_ms_ago >= ALIVE_MS
    ]
    if not hosts:
        return Check(
            name="agents",
            verdict=Verdict.FAIL,
            found="no host has registered",
            remedy="start `redmesh agent` on each host",
        )
    if silent:
        return Check(
            name="agents",
            verdict=Verdict.FAIL,
            found=f"silent: {', '.join(silent)}",
            remedy="start `redmesh agent` there again: it adopts the engines that still run",
        )
    return Check(name="agents", verdict=Verdict.OK, found=f"{len(hosts)} alive")


def proxies(problems: Mapping[str, str | None]) -> Check:
    """Judge the proxies by what their health says: id → why it is not ready, or None."""
    if not problems:
        return Check(
            name="proxies",
            verdict=Verdict.FAIL,
            found="no proxy is alive",
            remedy="start `redmesh proxy`",
        )
    unready = [f"{proxy} {problem}" for proxy, problem in problems.items() if problem]
    if unready:
        return Check(
            name="proxies",
            verdict=Verdict.FAIL,
            found="; ".join(unready),
            remedy="see its log; admin ports are on loopback: run doctor on the proxy's machine",
        )
    return Check(name="proxies", verdict=Verdict.OK, found=f"{len(problems)} ready")


def deployment(model: str, wanted: Deployment, replicas: Sequence[Replica]) -> Check:
    """Judge one deployment: are as many replicas READY as are wanted, and if not, why."""
    ready = [each for each in replicas if each.state is ReplicaState.READY]
    found = f"{len(ready)}/{wanted.replicas} ready"
    name = f"model {model}"
    if len(ready) >= wanted.replicas:
        return Check(name=name, verdict=Verdict.OK, found=found)
    reasons = [
        f"{each.rid} {each.state}{f': {each.reason}' if each.reason else ''}"
        for each in replicas
        if each.state is not ReplicaState.READY
    ]
    return Check(
        name=name,
        verdict=Verdict.WARN if ready else Verdict.FAIL,
        found="; ".join([found, *reasons]),
        remedy=f"`redmesh describe deployment/{model}` and `redmesh logs REPLICA` say more",
    )


def foreign(corrupt: Mapping[str, Sequence[str]]) -> Check:
    """Judge records that do not parse: where → fields."""
    bad = [f"{where}: {listed(fields)}" for where, fields in corrupt.items() if fields]
    if not bad:
        return Check(name="records", verdict=Verdict.OK, found="all parse")
    return Check(
        name="records",
        verdict=Verdict.WARN,
        found=f"do not parse, and are left out: {'; '.join(bad)}",
        remedy="look at them with `redmesh redis -- HGET KEY FIELD`, and delete what is not ours",
    )


def engine(problem: str | None) -> Check:
    """Judge the engine environment of this machine."""
    if problem is None:
        return Check(name="engine", verdict=Verdict.OK, found="vLLM can be started here")
    return Check(
        name="engine",
        verdict=Verdict.WARN,
        found=problem,
        remedy="run `make engine`, or set REDMESH_ENGINE_PYTHON; simulated engines work without",
    )


def space(name: str, free_bytes: int | None, least_bytes: int, remedy: str) -> Check:
    """Judge free space; None: the place does not exist here."""
    if free_bytes is None:
        return Check(name=name, verdict=Verdict.SKIP, found="does not exist here")
    found = f"{free_bytes / (1 << 30):.1f} GiB free"
    if free_bytes >= least_bytes:
        return Check(name=name, verdict=Verdict.OK, found=found)
    return Check(name=name, verdict=Verdict.WARN, found=found, remedy=remedy)
