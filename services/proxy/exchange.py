"""One request and its answer: reserve, send, relay, and try elsewhere while nobody has noticed.

An exchange is driven by callbacks (the ledger's answer, a connection, bytes from the replica, the
client's departure, the sweep of deadlines), each of which moves it on at once. Until the first
byte has been written to the client, any failure of a replica is repaired by another try. After
that, a stream that breaks off goes on from another replica where the rules allow it (see
`continuation`); any other answer is ended as an error that the client can see.

Invariant: at most one try is under way, and it is exactly then that `_connection` or `_connecting`
is set; a holding exists exactly from the ledger's answer to `_let_go`.
"""

import asyncio
from collections.abc import Callable

import structlog

from services.proxy import refusals
from services.proxy.admission import hold_s, may_wait
from services.proxy.failover import Failover
from services.proxy.inbound import Inbound
from services.proxy.phase import Phase
from services.proxy.pool import Endpoint
from services.proxy.refusals import Refusal
from services.proxy.relay import Relay, Step
from services.proxy.retry import PAUSE_S, STALE_S, UNSENT, Failure, Verdict
from services.proxy.serving import Fleet, Served
from services.proxy.tries import Tries, speaks_against
from services.proxy.upstream import Connection, Head
from shared.registry.ledger import BUSY, NONE

_log = structlog.get_logger(__name__)


class Exchange:
    """One request of a client, from its reservation to the end of its answer."""

    __slots__ = (
        "_attempts",
        "_connecting",
        "_connection",
        "_cut_client",
        "_deadline_s",
        "_endpoint",
        "_failover",
        "_fleet",
        "_fresh_only",
        "_heard_s",
        "_held_until_s",
        "_inbound",
        "_ledger_id",
        "_now_s",
        "_number",
        "_phase",
        "_relay",
        "_retry",
        "_served",
        "_silence_s",
        "_started_s",
        "_ticket",
        "_tries",
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
        self._now_s = fleet.now_s
        self._served = served
        self._inbound = inbound
        self._relay = relay
        self._cut_client = cut_client
        self._phase = Phase.RESERVING
        self._number = fleet.next_number()
        self._ledger_id = ""
        self._attempts = 0
        self._tries = Tries()
        self._failover = Failover(inbound, relay)
        self._ticket = 0
        self._held_until_s = 0.0
        self._started_s = fleet.now_s()
        self._deadline_s = self._started_s + served.table.spec.request_timeout_s
        self._silence_s = served.table.spec.inter_byte_timeout_s
        self._heard_s = self._started_s
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
        """Start, or go on where another proxy was; later arrivals queue behind those who wait."""
        self._served.exchanges.add(self)
        self._served.budget.request()
        if self._relay.client.started:
            if self._goes_on("its proxy is gone"):
                self._reserve()
        elif self._served.room.waiting:
            self._hold(self._fleet.settings.busy_timeout_s)
        else:
            self._reserve()

    # reserving

    def try_again(self) -> None:
        """Leave the waiting room and reserve."""
        self._unhold()
        if self._tries.failure is None:
            self._tries.forget()  # what the table did not know, it may know now
        self._reserve()

    def _reserve(self) -> None:
        self._phase = Phase.RESERVING
        self._retry = None
        self._attempts += 1
        self._ledger_id = f"{self._number:x}-{self._attempts}"
        served = self._served
        excluded = self._tries.rids
        if served.ejected:
            excluded = self._tries.excluded(served, self._now_s())
        offer = self._failover.offer(served.affinity)
        served.reservations.reserve(
            self._ledger_id, offer.cost_tokens, excluded, self._reserved, offer.candidates
        )

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
        elif self._tries.rids and self._tries.failure is not None:
            self._decide(others_ready=0)
        else:
            self._hold(self._hold_s())

    def _hold(self, timeout_s: float) -> None:
        room = self._served.room
        if not self._ticket:
            full = not may_wait(room.waiting, self._fleet.settings.max_held_requests)
            if full and not self._relay.started:
                self._refuse(self._served.full())
                return
            self._ticket = room.ticket(first=self._relay.started)
            self._held_until_s = min(self._now_s() + timeout_s, self._deadline_s)
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
            if rid in self._tries.rids or not self._tries.others(self._served):
                self._hold(self._hold_s())
            else:
                self._tries.avoid(rid)
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
        if (endpoint := self._endpoint) is None:
            return
        connection = None if self._fresh_only else endpoint.take()
        if connection is None:
            self._phase = Phase.CONNECTING
            self._connecting = endpoint.connect(self._connected)
        else:
            self._use(endpoint, connection)

    def _connected(self, connection: Connection | None, reason: str) -> None:
        self._connecting = None
        if connection is None or self._endpoint is None:
            self._failed(Failure.CONNECT, reason)
        else:
            self._use(self._endpoint, connection)

    def _use(self, endpoint: Endpoint, connection: Connection) -> None:
        path, body = self._failover.request
        self._phase = Phase.SENT
        self._tries.sent += 1
        self._connection = connection
        self._heard_s = self._now_s()
        connection.send(self, endpoint.request(path, self._inbound.request_id, body))
        if (prefix := self._inbound.prefix).digests:
            self._served.affinity.placed(prefix, endpoint.rid)

    # the replica's answer (upstream.Sink)

    def answer_started(self, head: Head) -> bool:
        """Take the head of the answer; nothing is written until there is something to say."""
        return self._relay.head(head)

    def answer_data(self, data: bytes, *, complete: bool) -> None:
        """Relay the next bytes."""
        self._heard_s = self._now_s()
        relay = self._relay
        if complete:
            self._connection = None
        elif self._phase is Phase.ANSWERING and relay.usual(data):  # nearly always
            self._flow()
            return
        outcome = relay.feed(data, complete=complete)
        if self._phase is not Phase.DONE:
            self._stepped(outcome)

    def _stepped(self, outcome: Step) -> None:
        """Draw the consequences of what was read."""
        relay = self._relay
        if outcome is Step.STARTED:
            self._answering()
            if relay.client.ended:
                self._finish(relay.outcome)
                return
            outcome = Step.GOES_ON
        if outcome is Step.GOES_ON:
            if self._phase is Phase.SENT and relay.goes_on:
                self._answering()
            self._flow()
        elif outcome is Step.ENDED:
            self._answered()
            self._finish(relay.outcome)
        elif outcome is Step.LOST:
            self._interrupted(relay.failure or Failure.RESET, relay.detail)
        elif outcome is Step.BROKEN:
            self._break(relay.detail)
        else:
            self._failed(relay.failure or Failure.RESET, relay.detail)

    def _flow(self) -> None:
        """Read on: not before the client has taken what there is, and carried where it may be."""
        connection, relay = self._connection, self._relay
        if connection is not None and relay.client.stalled:
            connection.pause()
        elif connection is not None and self._phase is Phase.ANSWERING:
            self._fleet.carry(connection, relay, self)

    def answer_lost(self, reason: str, *, stale: bool) -> None:
        """Try again, go on elsewhere, or tell the client that the answer broke off."""
        self._connection = None
        if self._phase is Phase.ANSWERING:
            self._interrupted(Failure.RESET, f"the replica's connection ended ({reason})")
        elif stale and not self._fresh_only and self._now_s() - self._heard_s < STALE_S:
            # The replica closed an idle connection while the request was on its way.
            self._fresh_only = True
            self._tries.sent -= 1
            self._relay.reset()
            self._send()
        else:
            self._failed(Failure.RESET, reason)

    def client_flows(self) -> None:
        """Go on reading: the client has taken what there was."""
        self._heard_s = self._now_s()
        if self._connection is not None:
            self._connection.resume()

    def _answering(self) -> None:
        """Note the first bytes: the prompt has been worked off."""
        self._phase = Phase.ANSWERING
        self._answered()
        metrics = self._served.metrics
        if self._relay.goes_on:
            metrics.failovers[self._failover.kind].inc()
        else:
            metrics.first_byte.observe(self._heard_s - self._started_s)
        if not self._relay.client.ended:
            self._served.reservations.settle(self._ledger_id, self._inbound.output_tokens)

    def _answered(self) -> None:
        if self._endpoint is not None and self._endpoint.breaker.failures:
            self._endpoint.breaker.answered()

    # failing

    def _interrupted(self, failure: Failure, detail: str) -> None:
        """Go on with a stream elsewhere, or end it as an error the client can see."""
        self._stop_try()
        if self._relay.tape is None:
            self._break(detail)
        elif self._goes_on(detail):
            self._failed(failure, detail)

    def _goes_on(self, detail: str) -> bool:
        """Prepare to go on with a stream elsewhere; False if it has been ended instead."""
        spec = self._served.table.spec
        if self._failover.completed(spec):
            self._finish(self._relay.outcome)
            return False
        refused = self._failover.go_on(spec)
        if refused is not None:
            self._served.metrics.failovers["refused"].inc()
            self._break(f"{detail}; it cannot go on elsewhere: {refused.reason}")
            return False
        self._tries = Tries()
        self._ticket = 0
        self._silence_s = spec.inter_byte_timeout_s
        self._deadline_s = self._now_s() + self._hold_s()
        self._log("stream_interrupted", detail)
        return True

    def _failed(self, failure: Failure, detail: str) -> None:
        """End a try of which the client saw nothing."""
        self._stop_try()
        served = self._served
        now_s = self._now_s()
        served.metrics.retries[failure.value].inc()
        endpoint = self._endpoint
        if speaks_against(failure) and endpoint is not None and endpoint.breaker.failed(now_s):
            served.metrics.ejections.inc()
            served.ejected[endpoint.rid] = endpoint.breaker
            self._log("replica_ejected", detail)
        self._tries.failed(failure, self.rid, detail, now_s)
        self._let_go()
        self._relay.reset()
        self._decide(others_ready=self._tries.others(served))

    def _decide(self, *, others_ready: int) -> None:
        now_s = self._now_s()
        tries = self._tries
        verdict = tries.verdict(
            others_ready=others_ready,
            now_s=now_s,
            deadline_s=self._deadline_s,
            hold_s=self._hold_s(),
            max_tries=self._fleet.settings.max_tries,
        )
        if verdict is Verdict.GIVE_UP:
            self._refuse(tries.refusal(self._served, overdue=now_s >= self._deadline_s))
            return
        delay_s = 0.0 if tries.failure in UNSENT else self._served.budget.delay_s(now_s)
        if verdict is Verdict.LATER:
            # With nobody else to ask, everybody may be asked again after a moment.
            tries.forget()
            delay_s = max(delay_s, PAUSE_S * self._fleet.random.uniform(0.25, 0.5))
        self._phase = Phase.RESERVING
        if delay_s:
            loop = asyncio.get_running_loop()
            self._retry = loop.call_later(delay_s, self._reserve)
        else:
            self._reserve()

    def _refuse(self, refusal: Refusal) -> None:
        if self._relay.started:
            self._served.metrics.failovers["failed"].inc()
            self._break(f"no other replica could go on with it: {refusal.message}")
            return
        self._stop_try()
        self._relay.refuse(refusal)
        self._finish("4xx" if refusal.status < 500 else "5xx")

    def _break(self, detail: str) -> None:
        """End an answer that had begun: as an error event, or by cutting the connection."""
        self._stop_try()
        self._log("answer_broken", detail)
        if not self._relay.break_off(refusals.stream_broken(detail)):
            self._cut_client()
        self._finish("cut")

    def _log(self, event: str, detail: str) -> None:
        _log.warning(
            event,
            model=self._served.model,
            rid=self.rid,
            request_id=self._inbound.request_id.decode(),
            reason=detail,
        )

    # ending

    def client_gone(self) -> None:
        """Stop everything: nobody listens. Does nothing once the answer is complete."""
        if self._phase is not Phase.DONE:
            self._stop_try()
            self._finish("gone")

    def shut(self) -> None:
        """End at once, as well as it can be ended: the proxy stops."""
        if self._relay.started and self._phase is not Phase.DONE:
            self._break("the proxy is shutting down")
        elif self._phase is not Phase.DONE:
            self._refuse(refusals.shutting_down())

    def withdraw(self, grace_s: float, *, ended: bool) -> None:
        """Leave a replica that the table says is lost; a stream may prove it wrong."""
        if self._phase is Phase.ANSWERING:
            if ended or self._relay.tape is not None:
                self._silence_s = min(self._silence_s, grace_s)
        elif self._phase in {Phase.SENT, Phase.CONNECTING}:
            self._failed(Failure.WITHDRAWN, "the replica has ended, or stands still")

    def trust(self) -> None:
        """Take `withdraw` back: the replica has proved it wrong."""
        if self._phase is Phase.ANSWERING:
            self._silence_s = self._served.table.spec.inter_byte_timeout_s

    def expire(self, now_s: float) -> None:
        """End what is overdue."""
        phase = self._phase
        if phase is Phase.ANSWERING:
            if self._is_silent(now_s):
                if self._relay.client.stalled:
                    self._stop_try()
                    self._cut_client()
                    self._finish("gone")
                else:
                    self._interrupted(Failure.SILENT, f"it was silent for {self._silence_s:g} s")
        elif phase is Phase.HELD:
            if now_s >= self._held_until_s:
                self._unhold()
                self._refuse(self._served.waited_in_vain(now_s - self._started_s))
        elif phase is Phase.SENT and self._relay.started:
            if self._is_silent(now_s):
                self._failed(Failure.SILENT, f"it was silent for {self._silence_s:g} s")
        elif phase is not Phase.DONE and now_s >= self._deadline_s:
            self._refuse(
                refusals.too_slow(self._served.model, self._served.table.spec.request_timeout_s)
            )

    def _is_silent(self, now_s: float) -> bool:
        """Tell whether nothing has come for too long; what is carried is asked for only then."""
        if now_s - self._heard_s > self._silence_s and self._connection is not None:
            self._heard_s = max(self._heard_s, self._connection.heard_s)
        return now_s - self._heard_s > self._silence_s

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
        self._phase = Phase.DONE
        self._let_go()
        took_s = self._now_s() - self._started_s
        self._served.finished(self, outcome, took_s, self._relay.tokens)
