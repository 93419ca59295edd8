"""The routing tables: what this proxy knows of each model, at which version.

Tables change in three ways: the catalogue of declared models, a snapshot (everything of a model at
one version), and a hint (one change, from one version to the next). A hint that does not follow on
the version at hand says that something was missed. A snapshot that no leader stands behind is not
authoritative: the table at hand is kept, because an empty Redis must not empty the fleet.

No I/O here; `convergence` fetches, `tablefile` keeps a copy on disk.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random

import msgspec

from shared.models.deployment import Deployment
from shared.models.replica import Replica, ReplicaState
from shared.models.routing import ModelSpec, Snapshot
from shared.registry.ledger import BUSY, NONE

NO_VERSION = -1
VANISHED_S = 15.0
"""A model that left the catalogue without having been marked as deleted is kept for this long."""


class StoredTable(msgspec.Struct, frozen=True, kw_only=True):
    """One table as it is kept on disk."""

    spec: ModelSpec
    ver: int
    replicas: dict[str, Replica]


class ModelTable:
    """What is known of one model."""

    def __init__(self, model: str, spec: ModelSpec) -> None:
        self.model = model
        self.spec = spec
        self.ver = NO_VERSION
        self.read_ver = NO_VERSION
        """Version last read, though perhaps not taken over."""
        self.authoritative = False
        self.wanted = 0
        """Replicas that are declared: with none, nothing is worth waiting for."""
        self.replicas: dict[str, Replica] = {}
        self.ready: dict[str, Replica] = {}

    def index(self) -> None:
        """Work out which replicas are READY."""
        self.ready = {
            rid: replica
            for rid, replica in self.replicas.items()
            if replica.state is ReplicaState.READY and replica.url
        }

    def knows(self, ver: int) -> bool:
        """Tell whether a version seen elsewhere brings nothing new."""
        return ver in {self.ver, self.read_ver}


Changed = Callable[[ModelTable], None]


class Tables:
    """All models, by name and alias."""

    def __init__(self) -> None:
        self._models: dict[str, ModelTable] = {}
        self._names: dict[str, ModelTable] = {}
        self._listeners: list[Changed] = []
        self._ended: set[str] = set()
        self._vanished_s: dict[str, float] = {}
        self.catalogued = False
        """The catalogue and its models have been read once: from Redis, or from our own copy."""

    def __len__(self) -> int:
        return len(self._models)

    def on_change(self, listener: Changed) -> None:
        """Call `listener` after every change of a table."""
        self._listeners.append(listener)

    def resolve(self, name: str) -> ModelTable | None:
        """Find a model by its name or an alias."""
        return self._names.get(name)

    def get(self, model: str) -> ModelTable | None:
        """Find a model by its own name."""
        return self._models.get(model)

    def models(self) -> list[ModelTable]:
        """Give all models, by name."""
        return [self._models[name] for name in sorted(self._models)]

    def apply_catalogue(self, deployments: Mapping[str, Deployment], now_s: float) -> list[str]:
        """Take over the declared models; return those whose tables must be read.

        An empty catalogue where there was one is taken for lost data, not for an empty fleet,
        unless every model was seen to be deleted. A model that is missing among others may be lost
        too, until those who remember it have declared it again: it is kept for a while.
        """
        self._ended.update(name for name, deployment in deployments.items() if deployment.deleted)
        declared = {name: d for name, d in deployments.items() if not d.deleted}
        lost = not deployments and not self._models.keys() <= self._ended
        gone = [] if lost else [name for name in self._models if name not in declared]
        self._vanished_s = {name: self._vanished_s.get(name, now_s) for name in gone}
        for name, since_s in self._vanished_s.items():
            if name in self._ended or now_s - since_s >= VANISHED_S:
                del self._models[name]
        unread: list[str] = []
        for name, deployment in declared.items():
            self._ended.discard(name)
            table = self._models.get(name)
            if table is None:
                table = self._models[name] = ModelTable(name, _spec_of(deployment))
            elif not table.authoritative:
                table.spec = _spec_of(deployment)
            else:
                table.spec = msgspec.structs.replace(table.spec, aliases=deployment.spec.aliases)
            table.wanted = deployment.replicas
            if table.ver == NO_VERSION:
                unread.append(name)
        self._name()
        return unread

    def apply_snapshot(self, snapshot: Snapshot) -> bool:
        """Take over a snapshot; return whether it was (False: not authoritative, or unknown)."""
        table = self._models.get(snapshot.model)
        if table is None:
            return False
        table.read_ver = snapshot.ver
        if not snapshot.authoritative:
            return False
        table.spec = msgspec.structs.replace(
            snapshot.spec, aliases=snapshot.spec.aliases or table.spec.aliases
        )
        table.ver = snapshot.ver
        table.authoritative = True
        table.replicas = dict(snapshot.replicas)
        table.wanted = snapshot.spec.desired_replicas
        self._changed(table)
        return True

    def apply_hint(
        self, model: str, prev: int, ver: int, rid: str, replica: Replica | None
    ) -> bool:
        """Take over one change; return False where the snapshot must be read instead."""
        table = self._models.get(model)
        if table is None or rid == "*":
            return False
        if table.knows(ver):
            return True
        if table.ver != prev:
            return False
        if replica is None:
            table.replicas.pop(rid, None)
        else:
            table.replicas[rid] = replica
        table.ver = ver
        self._changed(table)
        return True

    def known_rids(self) -> set[str]:
        """Name every replica of every table."""
        return {rid for table in self._models.values() for rid in table.replicas}

    def store(self) -> bytes:
        """Encode the authoritative tables, to be kept on disk."""
        return msgspec.json.encode(
            {
                name: StoredTable(spec=t.spec, ver=t.ver, replicas=t.replicas)
                for name, t in self._models.items()
                if t.authoritative
            }
        )

    def restore(self, content: bytes) -> None:
        """Begin with stored tables; raises msgspec.DecodeError and changes nothing if unreadable.

        They count as authoritative, since they were, but every version differs from theirs, so
        the first word from Redis renews them.
        """
        stored = msgspec.json.decode(content, type=dict[str, StoredTable])
        for name, kept in stored.items():
            table = self._models[name] = ModelTable(name, kept.spec)
            table.authoritative = True
            table.replicas = dict(kept.replicas)
            table.wanted = kept.spec.desired_replicas
            table.index()
        self._name()
        self.catalogued = bool(stored)

    def _changed(self, table: ModelTable) -> None:
        table.index()
        self._name()
        for listener in self._listeners:
            listener(table)

    def _name(self) -> None:
        names: dict[str, ModelTable] = {}
        for table in self._models.values():
            for alias in table.spec.aliases:
                names.setdefault(alias, table)
        names.update(self._models)  # a name always wins over an alias
        self._names = names


def _spec_of(deployment: Deployment) -> ModelSpec:
    spec = deployment.spec
    return ModelSpec(
        model=spec.name,
        aliases=spec.aliases,
        runner=spec.engine.runner,
        desired_replicas=deployment.replicas,
        max_requests=spec.routing.max_requests,
        request_timeout_s=spec.routing.request_timeout_s,
        inter_byte_timeout_s=spec.routing.inter_byte_timeout_s,
        stream_failover=spec.stream_failover,
        prefix_affinity=spec.routing.prefix_affinity,
        max_model_len_tokens=spec.engine.max_model_len_tokens or 0,
    )


def choose_least_own(
    ready: Mapping[str, Replica],
    own: Mapping[str, int],
    exclude: Collection[str],
    random: Random,
) -> str:
    """Choose the replica with the fewest requests of this proxy, ties at random.

    For when the ledger is away. Counts of others that are a second old are worse than none:
    every proxy would run to the same replica.
    """
    candidates: Sequence[str] = [rid for rid in ready if rid not in exclude]
    if not candidates:
        return NONE
    least = min(own.get(rid, 0) / ready[rid].capacity for rid in candidates)
    best = [rid for rid in candidates if own.get(rid, 0) / ready[rid].capacity == least]
    chosen = random.choice(best)
    return BUSY if own.get(chosen, 0) >= ready[chosen].max_requests else chosen
