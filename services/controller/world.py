"""The world as the leader sees it: one frozen reading of everything that a plan depends on.

Plans are pure functions of a `World`, so whatever they may know stands here: time (Redis' own),
what is declared, what is recorded, what was heard, and what the leader's own probes found.
"""

from typing import Final

import msgspec

from shared.models.deployment import Deployment, DeploymentSpec
from shared.models.host import Hold, Host
from shared.models.order import Order
from shared.models.replica import ENDED, Replica, ReplicaState
from shared.models.routing import ModelSpec

SILENT_MS: Final = 10_000
"""A replica or agent that has not beaten for longer than this is silent."""

LOST_MS: Final = 60_000
"""A silent replica that does not answer either is given up after this."""

AHEAD_MS: Final = 10_000
"""What is further ahead of Redis' clock was written before that clock went back."""

LIVING: Final = frozenset(
    {
        ReplicaState.PENDING,
        ReplicaState.STARTING,
        ReplicaState.READY,
        ReplicaState.UNHEALTHY,
    }
)
"""States that count towards the wanted number: all but DRAINING and the ended ones."""


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """One declared model: what is wanted of it and what is recorded of it."""

    deployment: Deployment
    spec: ModelSpec
    """The routing spec as stored; without `epoch` nobody has written it since the data began."""
    replicas: dict[str, Replica] = msgspec.field(default_factory=dict[str, Replica])
    beats_ms: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """Replica id → Redis time of the last heartbeat about it."""
    load_tokens: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """Replica id → outstanding cost of its reservations."""
    corrupt: tuple[str, ...] = ()
    """Replica ids whose records do not parse: left alone, and their orders too."""


class World(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a plan depends on, read within one tick."""

    now_ms: int
    """Redis' clock."""
    settled: bool = True
    """False within two heartbeats of Redis' or leadership's return: old beats prove nothing yet."""
    models: dict[str, ModelView] = msgspec.field(default_factory=dict[str, ModelView])
    hosts: dict[str, Host] = msgspec.field(default_factory=dict[str, Host])
    agents_silent_ms: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """Host → milliseconds since its agent's last beat; absent: never heard since the data began."""
    orders: dict[str, dict[str, Order]] = msgspec.field(default_factory=dict[str, dict[str, Order]])
    """Host → replica id → order."""
    holds: dict[str, Hold] = msgspec.field(default_factory=dict[str, Hold])
    """Subject → an operator's wish to keep work away."""
    answers: dict[str, bool] = msgspec.field(default_factory=dict[str, bool])
    """Silent replica's id → did its engine answer the leader's own probe?"""
    members_silent_ms: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """Member field → milliseconds since its last beat."""
    corrupt: dict[str, frozenset[str]] = msgspec.field(default_factory=dict[str, frozenset[str]])
    """Key → names of its fields that do not parse: left out of this reading."""

    def passed_ms(self, since_ms: int) -> int:
        """Tell how long ago `since_ms` was; what was written before the clock went back: for ever.

        Else a Redis whose clock goes back by an hour would hold everything up for an hour.
        """
        if since_ms - self.now_ms > AHEAD_MS:
            return self.now_ms
        return max(0, self.now_ms - since_ms)

    def agent_silent_ms(self, host: str) -> int:
        """How long the agent of `host` has been silent; for ever if it was never heard."""
        return self.agents_silent_ms.get(host, self.now_ms)

    def agent_alive(self, host: str) -> bool:
        """Tell whether the agent of `host` can be expected to obey orders."""
        return self.agent_silent_ms(host) <= SILENT_MS

    def held(self, replica: Replica) -> bool:
        """Tell whether an operator wants `replica` moved away from where it is."""
        wishes = (self.holds.get(f"host:{replica.host}"), self.holds.get(f"replica:{replica.rid}"))
        return any(wish is not None and wish.drain for wish in wishes)

    def spec_of(self, replica: Replica) -> DeploymentSpec:
        """Give the spec that `replica` was made from, or the nearest one that is still known."""
        order = self.orders.get(replica.host, {}).get(replica.rid)
        if order is not None and order.revision == replica.revision:
            return order.spec
        return self.models[replica.model].deployment.spec


def ended(replica: Replica) -> bool:
    """Tell whether `replica` has no future."""
    return replica.state in ENDED
