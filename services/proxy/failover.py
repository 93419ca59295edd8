"""One request's failovers: whether its stream goes on from another replica, and what that is asked.

The rules and the request itself come from `continuation`; here they meet one client's answer.
"""

from services.proxy.continuation.plan import Continuation, armed, plan, tail
from services.proxy.continuation.rules import MAX_FAILOVERS, Refused
from services.proxy.inbound import Inbound
from services.proxy.relay import Relay
from shared.models.routing import ModelSpec


class Failover:
    """How often the stream of one request has gone on elsewhere, and how it does now."""

    __slots__ = ("_continuation", "_count", "_inbound", "_relay")

    def __init__(self, inbound: Inbound, relay: Relay) -> None:
        self._inbound = inbound
        self._relay = relay
        self._continuation: Continuation | None = None
        self._count = 0

    @property
    def request(self) -> tuple[bytes, bytes]:
        """The path and the body to send to the next replica."""
        inbound, continuation = self._inbound, self._continuation
        if continuation is not None:
            return continuation.path, continuation.body
        if self._relay.tape is not None:
            return inbound.path, armed(inbound.body)
        return inbound.path, inbound.body

    @property
    def further_tokens(self) -> int:
        """Tokens of work that the next replica has with it, beside the prompt."""
        further_tokens = self._inbound.output_tokens
        if self._continuation is not None:
            further_tokens += self._continuation.kept_tokens
        return further_tokens

    @property
    def kind(self) -> str:
        """How the stream goes on, as the metric calls it."""
        return "exact" if self._continuation is None or self._continuation.exact else "valid"

    def completed(self) -> bool:
        """Complete a stream that has lost no more than its last events; False if it lost more."""
        tape = self._relay.tape
        if tape is None or not tape.finished:
            return False
        self._relay.complete(tail(self._inbound.body, tape))
        return True

    def go_on(self, spec: ModelSpec) -> Refused | None:
        """Have the next replica go on with the stream that has just lost its own, or refuse."""
        relay, tape = self._relay, self._relay.tape
        if tape is None:
            return Refused("token ids were not asked for")
        if self._count >= MAX_FAILOVERS:
            return Refused(f"it has gone on elsewhere {MAX_FAILOVERS} times")
        inbound = self._inbound
        planned = plan(
            inbound.path,
            inbound.body,
            tape,
            spec.stream_failover,
            context_tokens=spec.max_model_len_tokens,
        )
        if isinstance(planned, Refused):
            return planned
        self._count += 1
        self._continuation = planned
        relay.go_on()
        tape.splice(planned.seam, kept_tokens=None if planned.exact else planned.kept_tokens)
        return None
