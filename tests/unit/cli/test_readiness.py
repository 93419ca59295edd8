import msgspec
import pytest

from services.cli import checks
from services.cli.checks import Verdict
from services.cli.declaring import Change, changed, scaled
from services.cli.readiness import Observed, ProxyView, hopeless, progress
from services.cli.rediscommand import lines
from shared.errors import InvalidInputError
from shared.models.deployment import Deployment, DeploymentSpec, ReplicaBounds
from shared.models.event import Event
from shared.models.host import Member, MemberKind
from shared.models.replica import Replica, ReplicaState
from shared.registry.fleet import MemberSeen


def _replica(rid: str, state: ReplicaState) -> Replica:
    return Replica(rid=rid, model="m", gen=1, state=state, host="h", revision="r")


def _observed(**more: object) -> Observed:
    """Show a mesh where everything is ready: one model, one replica, two proxies."""
    ready = Observed(
        wanted={"m": 1},
        replicas={"m": (_replica("m-1", ReplicaState.READY),)},
        proxies=tuple(ProxyView(url=f"http://p{n}", ready_replicas={"m": 1}) for n in (0, 1)),
        agents=1,
        agents_wanted=1,
        leader=True,
    )
    return msgspec.structs.replace(ready, **more)


def _failures(count: int) -> tuple[Event, ...]:
    return tuple(
        Event(kind="ReplicaFailed", subject=f"replica/m-{n}", message="exit code 1")
        for n in range(count)
    )


def test_a_mesh_is_ready_when_all_of_it_is() -> None:
    """With leader, agents, proxies and replicas in place the mesh is ready."""
    assert progress(_observed()).ready


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"leader": False}, "no leader yet"),
        ({"agents": 0}, "agents 0/1"),
        (
            {"proxies": (ProxyView(url="u", problem="x"), ProxyView(url="v"))},
            "proxies 1/2 ready",
        ),
        (
            {"replicas": {"m": (_replica("m-1", ReplicaState.STARTING),)}},
            "m 0/1 replicas ready, 1 STARTING",
        ),
        ({"wanted": {"m": 2}}, "m 1/2 replicas ready"),
        ({"proxies": (ProxyView(url="u", ready_replicas={}),)}, "m 1/1 replicas ready"),
    ],
)
def test_each_missing_part_keeps_it_from_being_ready(change: dict[str, object], line: str) -> None:
    """What is missing is said; a proxy that does not know the replica yet counts as missing."""
    found = progress(_observed(**change))
    assert not found.ready
    assert line in found.lines


def test_a_model_that_wants_no_replicas_is_ready() -> None:
    """A deployment of zero replicas holds nobody up."""
    none = _observed(wanted={"m": 0}, replicas={}, proxies=(ProxyView(url="u"),))
    assert progress(none).ready


def test_three_failed_replicas_without_a_ready_one_are_hopeless() -> None:
    """Waiting ends after three failures in a row, not after two, and not while one serves."""
    failing = {"replicas": {"m": (_replica("m-9", ReplicaState.STARTING),)}}
    assert set(hopeless(_observed(events=_failures(3), **failing))) == {"m"}
    assert not hopeless(_observed(events=_failures(2), **failing))
    assert not hopeless(_observed(events=_failures(3)))
    other = {"wanted": {"other": 1}, "replicas": {}}
    assert not hopeless(_observed(events=_failures(3), **other))


def _spec(count: int = 2, maximum: int = 4, **more: object) -> DeploymentSpec:
    bounds = ReplicaBounds(count=count, max=maximum)
    return DeploymentSpec(name="m", replicas=bounds, **more)  # pyright: ignore[reportArgumentType] - fields by name


def test_an_apply_keeps_a_scaled_number_unless_the_file_changes_it() -> None:
    """Scaling lasts until the file names another number, and always within the bounds."""
    _, first = changed(None, _spec(), at_ms=1, by="me")
    assert (first.generation, first.replicas) == (1, 2)
    four = scaled(first, 4, at_ms=2, by="me")
    assert changed(four, _spec(), at_ms=3, by="me") == (Change.UNCHANGED, four)
    kept: Deployment = changed(four, _spec(aliases=("x",)), at_ms=3, by="me")[1]
    assert (kept.replicas, kept.generation) == (4, 3)
    assert changed(four, _spec(maximum=3), at_ms=3, by="me")[1].replicas == 3
    assert changed(four, _spec(count=1), at_ms=3, by="me")[1].replicas == 1
    with pytest.raises(InvalidInputError):
        scaled(first, 5, at_ms=2, by="me")


def test_a_deleted_deployment_is_created_again_with_a_higher_generation() -> None:
    """A generation never goes back, not even over a deletion."""
    _, first = changed(None, _spec(), at_ms=1, by="me")
    gone = msgspec.structs.replace(first, deleted=True, generation=5, replicas=0)
    change, again = changed(gone, _spec(), at_ms=2, by="me")
    assert (change, again.generation, again.replicas, again.deleted) == (
        Change.CREATED,
        6,
        2,
        False,
    )


def _seen(kind: MemberKind, name: str, ms_ago: int) -> dict[str, MemberSeen]:
    member = Member(kind=kind, id=name, host="h", pid=1, version="0", started_ms=0)
    return {member.field: MemberSeen(member, ms_ago)}


@pytest.mark.parametrize(
    ("check", "verdict"),
    [
        (checks.python((3, 10)), Verdict.FAIL),
        (checks.python((3, 13)), Verdict.OK),
        (checks.redis_version({"redis_version": "6.0.16"}), Verdict.FAIL),
        (checks.redis_version({"redis_version": "7.2.4", "valkey_version": "9.1"}), Verdict.OK),
        (checks.redis_version({}), Verdict.SKIP),
        (checks.latency([0.2, 0.3, 90.0]), Verdict.OK),
        (checks.latency([20.0, 30.0, 0.1]), Verdict.WARN),
        (checks.eviction({"maxmemory_policy": "noeviction", "maxmemory": "1"}), Verdict.OK),
        (checks.eviction({"maxmemory_policy": "allkeys-lru", "maxmemory": "0"}), Verdict.OK),
        (checks.eviction({"maxmemory_policy": "allkeys-lru", "maxmemory": "1"}), Verdict.FAIL),
        (checks.eviction({}), Verdict.SKIP),
        (checks.clock_skew(1000, 1001, 1002), Verdict.OK),
        (checks.clock_skew(10_000, 1001, 10_001), Verdict.WARN),
        (checks.clock_skew(1000, 10_001, 1001), Verdict.WARN),
        (checks.leader("", {}), Verdict.FAIL),
        (checks.leader("c", _seen(MemberKind.CONTROLLER, "c", 10)), Verdict.WARN),
        (checks.agents([], {}), Verdict.FAIL),
        (checks.agents(["a"], _seen(MemberKind.AGENT, "a", 60_000)), Verdict.FAIL),
        (checks.agents(["a"], _seen(MemberKind.AGENT, "a", 10)), Verdict.OK),
        (checks.proxies({}), Verdict.FAIL),
        (checks.proxies({"p": None}), Verdict.OK),
        (checks.proxies({"p": None, "q": "is not ready"}), Verdict.FAIL),
        (checks.foreign({"hosts": ("x",)}), Verdict.WARN),
        (checks.space("disk", 1, 2, "make room"), Verdict.WARN),
        (checks.space("disk", None, 2, "make room"), Verdict.SKIP),
        (checks.engine("no python"), Verdict.WARN),
    ],
)
def test_checks_judge_and_name_the_remedy(check: checks.Check, verdict: Verdict) -> None:
    """Each check has the right verdict; what is not well comes with a remedy."""
    assert check.verdict is verdict
    assert bool(check.remedy) == (verdict in (Verdict.WARN, Verdict.FAIL))


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (b"a\nb", '"a\\nb"'),
        (3, "(integer) 3"),
        (4e15, '"4000000000000000"'),
        (None, "(nil)"),
        (True, "OK"),
        ([], "(empty array)"),
        ([b"a", [b"b", 1]], '1) "a"\n2) 1) "b"\n   2) (integer) 1'),
        ({b"k": b"v"}, '1) "k"\n2) "v"'),
    ],
)
def test_replies_look_like_those_of_redis_cli(reply: object, text: str) -> None:
    """Every kind of reply is written as redis-cli writes it."""
    assert "\n".join(lines(reply)) == text
