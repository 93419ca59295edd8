"""Where a request has been sent so far, what came of it, and where it may go next."""

from services.proxy import refusals
from services.proxy.refusals import Refusal
from services.proxy.retry import CONNECTION_LEVEL, Failure, Situation, Verdict, decide
from services.proxy.serving import Served


class Tries:
    """The tries of one request; of a stream that goes on elsewhere, those since it was lost."""

    __slots__ = ("detail", "failure", "rids", "sent", "trouble_s")

    def __init__(self) -> None:
        self.rids: tuple[str, ...] = ()
        """Replicas not to ask again."""
        self.sent = 0
        """Tries that reached a replica."""
        self.failure: Failure | None = None
        """How the last one failed."""
        self.detail = ""
        """The same for a person."""
        self.trouble_s = 0.0
        """When the first one failed."""

    def failed(self, failure: Failure, rid: str | None, detail: str, now_s: float) -> None:
        """Note that a try on replica `rid` came to nothing."""
        self.trouble_s = self.trouble_s or now_s
        self.failure = failure
        self.detail = f"{rid}: {detail}"
        if rid is not None:
            self.avoid(rid)

    def avoid(self, rid: str) -> None:
        """Do not ask `rid` again."""
        if rid not in self.rids:
            self.rids = (*self.rids, rid)

    def forget(self) -> None:
        """Everybody may be asked again."""
        self.rids = ()

    def excluded(self, served: Served, now_s: float) -> tuple[str, ...]:
        """Name the replicas to avoid: tried ones, and ejected ones while there are others.

        While none is ejected, these are `rids`.
        """
        tried = self.rids
        ejected = [rid for rid in served.ejected_now(now_s) if rid not in tried]
        if len(ejected) + len(tried) >= len(served.table.ready):
            return tried
        return (*tried, *ejected)

    def others(self, served: Served) -> int:
        """Count the READY replicas that have not been asked."""
        return sum(rid not in self.rids for rid in served.table.ready)

    def verdict(
        self, *, others_ready: int, now_s: float, deadline_s: float, hold_s: float, max_tries: int
    ) -> Verdict:
        """Choose what happens now that a try has failed."""
        failure = self.failure
        if failure is None:
            return Verdict.LATER
        verdict = decide(
            Situation(
                failure=failure,
                sent_tries=self.sent,
                others_ready=others_ready,
                left_s=deadline_s - now_s,
            ),
            max_tries=max_tries,
        )
        if verdict is Verdict.LATER and now_s >= self.trouble_s + hold_s:
            return Verdict.GIVE_UP
        return verdict

    def refusal(self, served: Served, *, overdue: bool) -> Refusal:
        """Say to the client that all tries came to nothing."""
        if self.failure is Failure.REJECTED:
            return served.full()
        if overdue:
            return refusals.too_slow(served.model, served.table.spec.request_timeout_s)
        return refusals.replica_failed(served.model, max(1, self.sent), self.detail)


def speaks_against(failure: Failure) -> bool:
    """Tell whether a failure is the replica's fault, so that its breaker counts it."""
    return failure in CONNECTION_LEVEL
