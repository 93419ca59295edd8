"""The drills there are: fault, expectation and budget of each, in words that a report can print.

The budgets are promises. What is counted from known times says how: a killed leader's lease ends
within its time, and a standby asks once a second, so 1.5 × that time bounds it; a silent proxy is
suspected after 5 s and reaped 2 s later, at the next beat of a peer.
"""

from enum import StrEnum
from types import MappingProxyType
from typing import Final

import msgspec

from services.cli.drill.judge import Recovery
from services.cli.drill.records import Budget
from services.cli.drill.signs import Sign
from shared.errors import InvalidInputError


class Fault(StrEnum):
    """What an injector is asked to do."""

    REPLICA_KILL = "replica-kill"
    REPLICA_FREEZE = "replica-freeze"
    AGENT_KILL = "agent-kill"
    HOST_LOSS = "host-loss"
    PROXY_KILL = "proxy-kill"
    PROXY_DRAIN = "proxy-drain"
    LEADER_KILL = "controller-failover"
    LEADER_FREEZE = "controller-freeze"
    REDIS_RESTART = "redis-restart"
    REDIS_EMPTY = "redis-empty"
    REDIS_FAILOVER = "redis-failover"
    REDIS_AWAY = "redis-away"
    REDIS_DISCONNECT = "redis-disconnect"
    CUT_PROXY_REDIS = "partition-proxy-redis"
    CUT_PROXY_REPLICA = "partition-proxy-replica"
    ROLL = "rolling-upgrade"


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What budgets depend on: the model's and the fleet's own deadlines."""

    lease_s: float = 5.0
    """How long leadership lasts without a renewal."""
    silence_s: float = 120.0
    """How long a stream may be silent before it goes on elsewhere."""
    probe_s: float = 26.0
    """Within how long a frozen engine is out of routing, by its agent's default settings: 8 s until
    it is looked at, 5 s for its metrics and its probe, and the same twice more after pauses of 1 s
    is 25 s; the rest is the way to the proxies."""
    startup_s: float = 60.0
    """How long a replica may take from its start to READY."""


class Drill(msgspec.Struct, frozen=True, kw_only=True):
    """One drill."""

    fault: Fault
    what: str
    """The fault in a sentence."""
    expects: str
    """What must be so, in a sentence."""
    sign: Sign
    """By what it is seen that the fault struck."""
    recovery: Recovery
    budget: Budget
    hold_s: float = 0.0
    """How long the fault lasts, where it lasts."""
    needs: str = ""
    """What the mesh must have, for `drill list`."""

    @property
    def name(self) -> str:
        """What operators call it."""
        return self.fault.value


def _drills() -> tuple[Drill, ...]:
    return (
        Drill(
            fault=Fault.REPLICA_KILL,
            what="An engine is killed with SIGKILL while it answers.",
            expects="It gets no new request after a second; its streams go on from other "
            "replicas, token for token; a new replica takes its place.",
            sign=Sign.OUT,
            recovery=Recovery.OUT,
            budget=Budget(recover_s=1.0),
            needs="2 replicas",
        ),
        Drill(
            fault=Fault.REPLICA_FREEZE,
            what="An engine hangs: it holds its connections and says nothing.",
            expects="Its streams go on elsewhere once the model's silence limit is over; its "
            "agent's probes take it out of routing; thawed, it serves again.",
            sign=Sign.OUT,
            recovery=Recovery.OUT,
            budget=Budget(recover_s=0.0),
            hold_s=25.0,
            needs="2 replicas",
        ),
        Drill(
            fault=Fault.AGENT_KILL,
            what="The agent of a host is killed with SIGKILL.",
            expects="No request notices: engines outlive their agent, which adopts them when it "
            "is started again.",
            sign=Sign.GONE,
            recovery=Recovery.BACK,
            budget=Budget(recover_s=10.0),
        ),
        Drill(
            fault=Fault.HOST_LOSS,
            what="A host is lost: its engines die and its agent says nothing more, until the "
            "host comes back.",
            expects="Its streams go on from replicas on other hosts, and new requests avoid it; "
            "when it is back, it serves again.",
            sign=Sign.OUT,
            recovery=Recovery.STREAMS,
            budget=Budget(recover_s=5.0, whole_s=90.0),
            hold_s=6.0,
            needs="2 hosts with replicas of the model",
        ),
        Drill(
            fault=Fault.PROXY_KILL,
            what="A proxy is killed with SIGKILL while it relays.",
            expects="It loses the streams it had begun, and nothing else: clients send what had "
            "not begun to another proxy, and its reservations are given back.",
            sign=Sign.GONE,
            recovery=Recovery.REAPED,
            budget=Budget(recover_s=10.0, spare_own=True, resent=None),
            needs="2 proxies",
        ),
        Drill(
            fault=Fault.PROXY_DRAIN,
            what="A proxy is told to end (SIGTERM), as in a deployment of a new release.",
            expects="It finishes the streams it has; new requests go to other proxies; no "
            "stream breaks.",
            sign=Sign.GONE,
            recovery=Recovery.REAPED,
            budget=Budget(recover_s=30.0, resent=None),
            needs="2 proxies",
        ),
        Drill(
            fault=Fault.LEADER_KILL,
            what="The leading controller is killed with SIGKILL.",
            expects="No request notices; a standby leads within 1.5 × the lease's time.",
            sign=Sign.FOLLOWED,
            recovery=Recovery.LEADER,
            budget=Budget(recover_s=0.0),
            needs="2 controllers",
        ),
        Drill(
            fault=Fault.LEADER_FREEZE,
            what="The leading controller is frozen (SIGSTOP), and thawed when another leads.",
            expects="No request notices; a standby leads within 1.5 × the lease's time; the "
            "thawed one acts no more.",
            sign=Sign.FOLLOWED,
            recovery=Recovery.LEADER,
            budget=Budget(recover_s=0.0),
            hold_s=10.0,
            needs="2 controllers",
        ),
        Drill(
            fault=Fault.REDIS_RESTART,
            what="Redis is killed and started again with its data.",
            expects="No request notices: proxies route by what they know; two seconds after "
            "Redis answers, the ledger is in use again, and it becomes exact.",
            sign=Sign.REPLACED,
            recovery=Recovery.LEDGER,
            budget=Budget(recover_s=2.0),
        ),
        Drill(
            fault=Fault.REDIS_EMPTY,
            what="Redis is killed, loses all its data, and comes back empty.",
            expects="No request notices: agents register again what runs, proxies what they "
            "relay. What the operator had declared is declared again at once.",
            sign=Sign.EMPTIED,
            recovery=Recovery.LEDGER,
            budget=Budget(recover_s=2.0),
        ),
        Drill(
            fault=Fault.REDIS_FAILOVER,
            what="A lagging replica of Redis becomes primary: the last writes are lost.",
            expects="No request notices; two seconds after the new primary answers, the ledger "
            "is in use again, and it becomes exact.",
            sign=Sign.REPLACED,
            recovery=Recovery.LEDGER,
            budget=Budget(recover_s=2.0),
            needs="a Redis with a replica behind one address, or `redmesh up --links`",
        ),
        Drill(
            fault=Fault.REDIS_AWAY,
            what="Redis answers nobody for a while.",
            expects="No request notices, and none waits for Redis again and again; two seconds "
            "after it answers, the ledger is in use again, and it becomes exact.",
            sign=Sign.SILENT,
            recovery=Recovery.LEDGER,
            budget=Budget(recover_s=2.0),
            hold_s=10.0,
        ),
        Drill(
            fault=Fault.REDIS_DISCONNECT,
            what="Every connection to Redis is cut at once (CLIENT KILL).",
            expects="No request notices: everybody connects again.",
            sign=Sign.DISCONNECTED,
            recovery=Recovery.LEDGER,
            budget=Budget(recover_s=2.0),
        ),
        Drill(
            fault=Fault.CUT_PROXY_REDIS,
            what="One proxy cannot reach Redis, in neither direction; everybody else can.",
            expects="No request notices: it routes by its last table and its own counts, peers "
            "give back its reservations, and it takes them again when the way is free.",
            sign=Sign.APART,
            recovery=Recovery.LEDGER,
            budget=Budget(recover_s=3.0),
            hold_s=12.0,
            needs="a mesh started with `redmesh up --links`",
        ),
        Drill(
            fault=Fault.CUT_PROXY_REPLICA,
            what="No proxy can reach one replica, which its own agent finds well.",
            expects="Its streams go on elsewhere once the model's silence limit is over; nothing "
            "is lost, although requests that it was given later may wait until the way is free.",
            sign=Sign.LEFT,
            recovery=Recovery.STREAMS,
            budget=Budget(recover_s=0.0),
            hold_s=12.0,
            needs="a mesh started with `redmesh up --links`, 2 replicas",
        ),
        Drill(
            fault=Fault.ROLL,
            what="A new revision is declared and rolled out, and then the old one again.",
            expects="Replicas are replaced one by one, new before old; no stream breaks.",
            sign=Sign.ROLLED,
            recovery=Recovery.ROLLED,
            budget=Budget(recover_s=0.0),
        ),
    )


DRILLS: Final = MappingProxyType({drill.name: drill for drill in _drills()})
"""Name → drill, in the order of `drill list`."""


def find(name: str) -> Drill:
    """Find a drill; raise `InvalidInputError` that lists those there are."""
    drill = DRILLS.get(name)
    if drill is None:
        raise InvalidInputError(
            f"there is no drill {name!r}; there are: {', '.join(DRILLS)}", field="NAME"
        )
    return drill


def budget_of(drill: Drill, facts: Facts, replicas: int = 1) -> Budget:
    """Give the drill's budget; what depends on the mesh's own deadlines is computed here."""
    recover_s = drill.budget.recover_s
    whole_s = max(drill.budget.whole_s, facts.startup_s)
    match drill.fault:
        case Fault.LEADER_KILL | Fault.LEADER_FREEZE:
            recover_s = 1.5 * facts.lease_s
        case Fault.REPLICA_FREEZE:
            recover_s = facts.probe_s
        case Fault.CUT_PROXY_REPLICA:
            # A link accepts connections also while it is cut: who asks anew waits until it opens.
            recover_s = max(facts.silence_s, drill.hold_s) + 5.0
        case Fault.ROLL:
            recover_s = whole_s = facts.startup_s * replicas
        case _:
            pass
    return msgspec.structs.replace(drill.budget, recover_s=recover_s, whole_s=whole_s)
