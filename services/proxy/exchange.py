"""One request and its answer: reserve, send, relay, and try elsewhere while nobody has noticed.

An exchange is driven by callbacks (the ledger's answer, a connection, bytes from the replica, the
client's departure, the sweep of deadlines), each of which moves it on at once. Until the first
byte has been written to the client, any failure of a replica is repaired by another try. After
that, an answer that breaks off is ended as an error that the client can see.

Invariant: at most one try is under way, and it is exactly then that `_connection` or `_connecting`
is set; a holding exists exactly from the ledger's answer to `_let_go`.
"""

import asyncio
from collections.abc import Callable
from enum import Enum

import structlog

from services.proxy import refusals
from services.proxy.admission import hold_s, may_wait, retry_after_s
from services.proxy.inbound import Inbound
from services.proxy.pool import Endpoint
from services.proxy.refusals import Refusal
from services.proxy.relay import Relay, Step
from services.proxy.retry import (
    CONNECTION_LEVEL,
    PAUSE_S,
    STALE_S,
    UNSENT,
    Failure,
    Situation,
    Verdict,
    decide,
)
from services.proxy.serving import Fleet, Served
from services.proxy.upstream import Connection, Head
from shared.registry.ledger import BUSY, NONE

_log = structlog.get_logger(__name__)


class Phase(Enum):
    """Where an exchange stands."""

    RESERVING = 0
    HELD = 1
    """Waits for a replica, or for a moment to pass."""
    CONNECTING = 2
    SENT = 3
    """On a replica; the client has seen nothing."""
    ANSWERING = 4
    """The client has seen something."""
    DONE = 5


class Exchange:
    """One request of a client, from its reservation to the end of its answer."""

    __slots__ = (
        "_connecting",
        "_connection",
        "_cut_client",
        "_deadline_s",
        "_endpoint",
        "_failure",
        "_failure_detail",
        "_fleet",
        "_fresh_only",
        "_heard_s",
        "_held_until_s",
        "_inbound",
        "_ledger_id",
        "_number",
        "_phase",
        "_relay",
        "_retry",
        "_sent_tries",
        "_served",
        "_silence_s",
        "_started_s",
        "_ticket",
        "_tried",
        "_tries",
        "_trouble_s",
        "gen",
        "rid",
    )

    def __init__(
        self,
        fleet: Fleet,
        served: Served,
        inbound: Inbound,
        relay: Relay,
        cut_client: Callable[[], None],
    ) -> None:
        self._fleet = fleet
        self._served = served
        self._inbound = inbound
        self._relay = relay
        self._cut_client = cut_client
        self._phase = Phase.RESERVING
        self._number = fleet.next_number()
        self._ledger_id = ""
        self._tries = 0
        self._sent_tries = 0
        self._tried: tuple[str, ...] = ()
        self._ticket = 0
        self._held_until_s = 0.0
        self._started_s = fleet.now_s()
        self._deadline_s = self._started_s + served.table.spec.request_timeout_s
        self._silence_s = served.table.spec.inter_byte_timeout_s
        self._heard_s = self._started_s
        self._failure: Failure | None = None
        self._failure_detail = ""
        self._trouble_s = 0.0
        self._fresh_only = False
        self._endpoint: Endpoint | None = None
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self.rid: str | None = None
        """Replica that carries it now."""
        self.gen = 0

    @property
    def done(self) -> bool:
        """Tell whether nothing more will happen."""
        return self._phase is Phase.DONE

    @property
    def held(self) -> bool:
        """Tell whether it waits in the waiting room."""
        return self._phase is Phase.HELD

    def begin(self) -> None:
        """Start; later arrivals queue behind those who wait already."""
        self._served.exchanges.add(self)
        self._served.budget.request()
        if self._served.room.waiting:
            self._hold(self._fleet.settings.busy_timeout_s)
        else:
            self._reserve()

    # reserving

    def try_again(self) -> None:
        """Leave the waiting room and reserve."""
        self._unhold()
        if self._failure is None:
            self._tried = ()  # what the table did not know, it may know now
        self._reserve()

    def _reserve(self) -> None:
        self._phase = Phase.RESERVING
        self._retry = None
        self._tries += 1
        self._ledger_id = f"{self._number:x}-{self._tries}"
        self._served.reservations.reserve(
            self._ledger_id, self._cost_tokens(), self._excluded(), self._reserved
        )

    def _cost_tokens(self) -> int:
        return self._inbound.prompt_tokens + self._inbound.output_tokens

    def _excluded(self) -> tuple[str, ...]:
        """Name the replicas to avoid: tried ones, and ejected ones while there are others."""
        tried = self._tried
        if not self._served.ejected:
            return tried
        ejected = [rid for rid in self._served.ejected_now(self._fleet.now_s()) if rid not in tried]
        if len(ejected) + len(tried) >= len(self._served.table.ready):
            return tried
        return (*tried, *ejected)

    def _reserved(self, answer: str) -> None:
        if self._phase is not Phase.RESERVING:
            self._served.reservations.release(self._ledger_id)
            return
        if answer == BUSY:
            self._hold(self._fleet.settings.busy_timeout_s)
        elif answer == NONE:
            self._nothing_ready()
        else:
            self._dispatch(answer)

    def _nothing_ready(self) -> None:
        served = self._served
        if not served.table.wanted and not served.table.ready:
            self._refuse(refusals.scaled_to_zero(served.model))
        elif self._tried and self._failure is not None:
            self._decide(self._failure, others_ready=0)
        else:
            self._hold(self._hold_s())

    def _hold(self, timeout_s: float) -> None:
        room = self._served.room
        if not self._ticket:
            if not may_wait(room.waiting, self._fleet.settings.max_held_requests):
                self._refuse_busy()
                return
            self._ticket = room.ticket()
            self._held_until_s = min(self._fleet.now_s() + timeout_s, self._deadline_s)
        elif not self._served.table.ready:
            # Waiting for a replica to come takes longer than waiting for one to have room.
            hold_until_s = self._started_s + self._hold_s()
            self._held_until_s = max(self._held_until_s, min(hold_until_s, self._deadline_s))
        self._phase = Phase.HELD
        room.enter(self._ticket, self)

    def _hold_s(self) -> float:
        return hold_s(self._served.table.spec, self._fleet.settings.hold_timeout_s)

    def _unhold(self) -> None:
        if self._phase is Phase.HELD:
            self._served.room.left()
            self._phase = Phase.RESERVING

    # sending

    def _dispatch(self, rid: str) -> None:
        replica = self._served.table.replicas.get(rid)
        if replica is None or not replica.url:
            # The ledger is ahead of the table (the version in its reply has it read again), or
            # the record does not parse: who has another replica need not wait for this one.
            self._let_go()
            if rid in self._tried or not self._served.table.ready.keys() - {*self._tried}:
                self._hold(self._hold_s())
            else:
                self._tried = (*self._tried, rid)
                self._reserve()
            return
        self.rid = rid
        self.gen = replica.gen
        self._fresh_only = False
        try:
            self._endpoint = self._fleet.endpoints.of(replica)
        except ValueError as error:
            self._endpoint = None
            self._failed(Failure.CONNECT, f"its URL makes no sense: {error}")
            return
        self._send()

    def _send(self) -> None:
        endpoint = self._endpoint
        if endpoint is None:
            return
        connection = None if self._fresh_only else endpoint.take()
        if connection is None:
            self._phase = Phase.CONNECTING
            self._connecting = endpoint.connect(self._connected)
        else:
            self._use(endpoint, connection)

    def _connected(self, connection: Connection | None, reason: str) -> None:
        self._connecting = None
        endpoint = self._endpoint
        if connection is None or endpoint is None:
            self._failed(Failure.CONNECT, reason)
        else:
            self._use(endpoint, connection)

    def _use(self, endpoint: Endpoint, connection: Connection) -> None:
        inbound = self._inbound
        self._phase = Phase.SENT
        self._sent_tries += 1
        self._connection = connection
        self._heard_s = self._fleet.now_s()
        connection.send(self, endpoint.request(inbound.path, inbound.request_id, inbound.body))

    # the replica's answer (upstream.Sink)

    def answer_started(self, head: Head) -> None:
        """Take the head of the answer; nothing is written until there is something to say."""
        self._relay.head(head)

    def answer_data(self, data: bytes, *, complete: bool) -> None:
        """Relay the next bytes."""
        self._heard_s = self._fleet.now_s()
        if complete:
            self._connection = None
        outcome = self._relay.feed(data, complete=complete)
        if self._phase is Phase.DONE:
            return
        if outcome is Step.STARTED:
            self._answering()
            outcome = Step.ENDED if self._relay.ended else Step.GOES_ON
        if outcome is Step.GOES_ON:
            if self._relay.stalled and self._connection is not None:
                self._connection.pause()
        elif outcome is Step.ENDED:
            self._answered()
            self._finish(self._relay.outcome)
        elif outcome is Step.BROKEN:
            self._break(self._relay.detail)
        else:
            self._failed(self._relay.failure or Failure.RESET, self._relay.detail)

    def answer_lost(self, reason: str, *, stale: bool) -> None:
        """Try again, or tell the client that the answer broke off."""
        self._connection = None
        if self._phase is Phase.ANSWERING:
            self._break(f"the replica's connection ended ({reason})")
        elif stale and not self._fresh_only and self._fleet.now_s() - self._heard_s < STALE_S:
            # The replica closed an idle connection while the request was on its way.
            self._fresh_only = True
            self._sent_tries -= 1
            self._relay.reset()
            self._send()
        else:
            self._failed(Failure.RESET, reason)

    def client_flows(self) -> None:
        """Go on reading: the client has taken what there was."""
        self._heard_s = self._fleet.now_s()
        if self._connection is not None:
            self._connection.resume()

    def _answering(self) -> None:
        """Note the first byte: the prompt has been worked off."""
        self._phase = Phase.ANSWERING
        self._answered()
        self._served.metrics.first_byte.observe(self._heard_s - self._started_s)
        holding = self._served.reservations.live.get(self._ledger_id)
        if holding is not None and not self._relay.ended:
            holding.streamed = True
            self._served.reservations.settle(self._ledger_id, self._inbound.output_tokens)

    def _answered(self) -> None:
        if self._endpoint is not None:
            self._endpoint.breaker.answered()

    # failing

    def _failed(self, failure: Failure, detail: str) -> None:
        """End a try that failed before the client saw anything."""
        self._stop_try()
        served = self._served
        served.metrics.retries[failure.value].inc()
        self._trouble_s = self._trouble_s or self._fleet.now_s()
        endpoint = self._endpoint
        if (
            failure in CONNECTION_LEVEL
            and endpoint is not None
            and endpoint.breaker.failed(self._fleet.now_s())
        ):
            served.metrics.ejections.inc()
            served.ejected[endpoint.rid] = endpoint.breaker
            _log.warning("replica_ejected", model=served.model, rid=self.rid, reason=detail)
        self._failure = failure
        self._failure_detail = f"{self.rid}: {detail}"
        if self.rid is not None and self.rid not in self._tried:
            self._tried = (*self._tried, self.rid)
        self._let_go()
        self._relay.reset()
        others = sum(rid not in self._tried for rid in served.table.ready)
        self._decide(failure, others_ready=others)

    def _decide(self, failure: Failure, *, others_ready: int) -> None:
        now_s = self._fleet.now_s()
        verdict = decide(
            Situation(
                failure=failure,
                sent_tries=self._sent_tries,
                others_ready=others_ready,
                left_s=self._deadline_s - now_s,
            ),
            max_tries=self._fleet.settings.max_tries,
        )
        if verdict is Verdict.LATER and now_s >= self._trouble_s + self._hold_s():
            verdict = Verdict.GIVE_UP
        if verdict is Verdict.GIVE_UP:
            self._give_up(failure)
            return
        delay_s = 0.0 if failure in UNSENT else self._served.budget.delay_s(now_s)
        if verdict is Verdict.LATER:
            # With nobody else to ask, everybody may be asked again after a moment.
            self._tried = ()
            delay_s = max(delay_s, PAUSE_S * self._fleet.random.uniform(0.25, 0.5))
        self._phase = Phase.RESERVING
        if delay_s:
            loop = asyncio.get_running_loop()
            self._retry = loop.call_later(delay_s, self._reserve)
        else:
            self._reserve()

    def _give_up(self, failure: Failure) -> None:
        model = self._served.model
        if failure is Failure.REJECTED:
            self._refuse_busy()
        elif self._fleet.now_s() >= self._deadline_s:
            self._refuse(refusals.too_slow(model, self._served.table.spec.request_timeout_s))
        else:
            self._refuse(
                refusals.replica_failed(model, max(1, self._sent_tries), self._failure_detail)
            )

    def _refuse_busy(self) -> None:
        served = self._served
        seconds = retry_after_s(served.room.waiting, served.finished_per_s)
        self._refuse(refusals.busy(served.model, seconds))

    def _refuse(self, refusal: Refusal) -> None:
        self._stop_try()
        self._relay.refuse(refusal)
        self._finish("4xx" if refusal.status < 500 else "5xx")

    def _break(self, detail: str) -> None:
        """End an answer that had begun: as an error event, or by cutting the connection."""
        self._stop_try()
        _log.warning(
            "answer_broken",
            model=self._served.model,
            rid=self.rid,
            request_id=self._inbound.request_id.decode(),
            reason=detail,
        )
        if not self._relay.break_off(refusals.stream_broken(detail)):
            self._cut_client()
        self._finish("cut")

    # ending

    def client_gone(self) -> None:
        """Stop everything: nobody listens. Does nothing once the answer is complete."""
        if self._phase is not Phase.DONE:
            self._stop_try()
            self._finish("gone")

    def shut(self) -> None:
        """End at once, as well as it can be ended: the proxy stops."""
        if self._phase is Phase.ANSWERING:
            self._break("the proxy is shutting down")
        elif self._phase is not Phase.DONE:
            self._refuse(refusals.shutting_down())

    def withdraw(self, grace_s: float) -> None:
        """Leave a replica that the table says has ended; a stream may prove it wrong."""
        if self._phase is Phase.ANSWERING:
            self._silence_s = min(self._silence_s, grace_s)
        elif self._phase in {Phase.SENT, Phase.CONNECTING}:
            self._failed(Failure.WITHDRAWN, "the replica has ended")

    def expire(self, now_s: float) -> None:
        """End what is overdue."""
        phase = self._phase
        if phase is Phase.ANSWERING:
            if now_s - self._heard_s > self._silence_s:
                if self._relay.stalled:
                    self._stop_try()
                    self._cut_client()
                    self._finish("gone")
                else:
                    self._break(f"the replica was silent for {self._silence_s:g} s")
        elif phase is Phase.HELD:
            if now_s >= self._held_until_s:
                self._unhold()
                self._waited_in_vain(now_s)
        elif phase is not Phase.DONE and now_s >= self._deadline_s:
            self._refuse(
                refusals.too_slow(self._served.model, self._served.table.spec.request_timeout_s)
            )

    def _waited_in_vain(self, now_s: float) -> None:
        if self._served.table.ready:
            self._refuse_busy()
        else:
            waited_s = now_s - self._started_s
            self._refuse(refusals.nothing_ready(self._served.model, waited_s))

    def _stop_try(self) -> None:
        self._unhold()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    def _let_go(self) -> None:
        self._served.reservations.release(self._ledger_id)
        self.rid = None

    def _finish(self, outcome: str) -> None:
        served = self._served
        self._phase = Phase.DONE
        self._let_go()
        served.exchanges.discard(self)
        metrics = served.metrics
        metrics.outcomes[outcome].inc()
        metrics.duration.observe(self._fleet.now_s() - self._started_s)
        tokens = self._relay.tokens
        if tokens:
            metrics.events.inc(tokens)
            if outcome == "2xx":
                served.output.observe(tokens)
        served.finished()
