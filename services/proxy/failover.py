"""One request's failovers: whether its stream goes on from another replica, and what that is asked.

The rules and the request itself come from `continuation`; here they meet one client's answer. How
often a stream has lost its replica stands on its tape, so that it counts whichever proxy writes it.
"""

from services.proxy.continuation.plan import Continuation, armed, finish, plan, tail
from services.proxy.continuation.rules import MAX_FAILOVERS, Refused
from services.proxy.inbound import Inbound
from services.proxy.policies.affinity import Affinity, Offer
from services.proxy.relay import Relay
from shared.models.routing import ModelSpec


class Failover:
    """Whether the stream of one request may go on elsewhere, and how it does now."""

    __slots__ = ("_continuation", "_inbound", "_relay", "_taken_over")

    def __init__(self, inbound: Inbound, relay: Relay) -> None:
        self._inbound = inbound
        self._relay = relay
        self._continuation: Continuation | None = None
        self._taken_over = relay.client.started
        """It goes on because its proxy is gone: no replica was lost."""

    @property
    def request(self) -> tuple[bytes, bytes]:
        """The path and the body to send to the next replica."""
        inbound, continuation = self._inbound, self._continuation
        if continuation is not None:
            return continuation.path, continuation.body
        if self._relay.tape is not None:
            return inbound.path, armed(inbound.body)
        return inbound.path, inbound.body

    def offer(self, affinity: Affinity) -> Offer:
        """Say what the next replica has with it, and where it has less."""
        inbound = self._inbound
        further_tokens = inbound.output_tokens
        if self._continuation is not None:
            further_tokens += self._continuation.kept_tokens
        return affinity.offer(inbound.prefix, inbound.prompt_tokens, further_tokens)

    @property
    def kind(self) -> str:
        """How the stream goes on, as the metric calls it."""
        return "exact" if self._continuation is None or self._continuation.exact else "valid"

    def completed(self, spec: ModelSpec) -> bool:
        """Complete a stream that has lost no more than its last events; False if it lost more."""
        tape, inbound = self._relay.tape, self._inbound
        if tape is None:
            return False
        last = b""
        if not tape.finished:
            context_tokens = spec.max_model_len_tokens
            policy = spec.stream_failover
            last = finish(inbound.path, inbound.body, tape, policy, context_tokens=context_tokens)
            tape.finished = bool(last)
        if tape.finished:
            self._relay.complete(last + tail(inbound.body, tape))
        return tape.finished

    def go_on(self, spec: ModelSpec) -> Refused | None:
        """Have the next replica go on with the stream that has just lost its own, or refuse."""
        relay, tape = self._relay, self._relay.tape
        if tape is None:
            return Refused("token ids were not asked for")
        if tape.failovers >= MAX_FAILOVERS and not self._taken_over:
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
        tape.failovers += not self._taken_over
        self._taken_over = False
        self._continuation = planned
        relay.go_on()
        tape.splice(planned.seam, kept_tokens=None if planned.exact else planned.kept_tokens)
        return None
