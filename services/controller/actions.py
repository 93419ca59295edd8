"""What a plan may ask for. Each action is small, fenced, safe to repeat, and carries its reason.

A plan is a list of these, carried out in order. It may be cut short after any of them: what is
left to do follows again from what is stored.
"""

from typing import ClassVar

import msgspec

from shared.models.event import Event
from shared.models.order import Order
from shared.models.replica import Replica, ReplicaState
from shared.models.routing import ModelSpec


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all actions."""

    kind: ClassVar[str] = "action"
    """Word for this action in metrics and logs."""

    reason: str
    """Why, for a person."""
    event: Event | None = None
    """What to tell operators once it is done."""


class WriteSpec(Action, frozen=True, kw_only=True):
    """Write the routing spec of a model; this is what makes its snapshots authoritative."""

    kind: ClassVar[str] = "write_spec"
    spec: ModelSpec


class CreateReplica(Action, frozen=True, kw_only=True):
    """Record a PENDING replica, then give its host the order to run it.

    The ids are made when it is carried out: `replica` and `order` come without rid and gen.
    """

    kind: ClassVar[str] = "create_replica"
    replica: Replica
    order: Order


class Move(Action, frozen=True, kw_only=True):
    """Move a replica to another state, if it is still in the one that the plan saw."""

    kind: ClassVar[str] = "move"
    replica: Replica
    to: ReplicaState
    order: Order | None = None
    """The order that follows from the new state, put after the record has changed."""


class PatchReplica(Action, frozen=True, kw_only=True):
    """Change fields of a record without changing its state."""

    kind: ClassVar[str] = "patch_replica"
    replica: Replica
    max_requests: int


class PutOrder(Action, frozen=True, kw_only=True):
    """Give a host the order that a record's state calls for."""

    kind: ClassVar[str] = "put_order"
    host: str
    order: Order


class DropOrder(Action, frozen=True, kw_only=True):
    """Take back an order that no record stands behind."""

    kind: ClassVar[str] = "drop_order"
    host: str
    rid: str


class RemoveReplica(Action, frozen=True, kw_only=True):
    """Forget a replica that has ended: its order first, then its record.

    The other way round, an interruption would leave an order to run what nobody remembers.
    """

    kind: ClassVar[str] = "remove_replica"
    replica: Replica


class ForgetModel(Action, frozen=True, kw_only=True):
    """Forget a deleted deployment of which nothing is left."""

    kind: ClassVar[str] = "forget_model"
    model: str


class ForgetHost(Action, frozen=True, kw_only=True):
    """Forget a host that has long been silent and holds nothing."""

    kind: ClassVar[str] = "forget_host"
    host: str


class ForgetMember(Action, frozen=True, kw_only=True):
    """Forget a process that has long been silent."""

    kind: ClassVar[str] = "forget_member"
    field: str


class DropHold(Action, frozen=True, kw_only=True):
    """Drop an operator's wish whose subject no longer exists."""

    kind: ClassVar[str] = "drop_hold"
    subject: str


class Report(Action, frozen=True, kw_only=True):
    """Tell operators something without changing anything; repeated ones are told once."""

    kind: ClassVar[str] = "report"
