"""What a drill is judged by: requests, samples of the mesh and marks on one time line. Pure data.

All times are seconds since the beginning of the run, on one monotonic clock; `fault_s` of a run is
when the fault struck.
"""

from enum import StrEnum

import msgspec


class Outcome(StrEnum):
    """How one request ended."""

    OK = "ok"
    REFUSED = "refused"
    """No proxy accepted a connection."""
    RESET = "reset"
    """The connection ended before the answer did."""
    STATUS = "status"
    """A whole answer, but not of status 200."""
    ERROR_EVENT = "error-event"
    """A stream whose last event is an error object."""
    TRUNCATED = "truncated"
    """A clean end without all that a success must have."""
    MALFORMED = "malformed"
    """Something that is not a stream of JSON events."""
    DIFFERENT = "different"
    """A whole answer whose text is not that of an undisturbed run."""
    TIMEOUT = "timeout"
    """Nothing more came within the client's patience."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request of the driven load, judged when it had ended."""

    outcome: Outcome
    began_s: float
    first_s: float | None
    """When the first byte of the answer came; None for never."""
    ended_s: float
    proxy: str
    """URL of the proxy that gave the final answer."""
    tries: int = 1
    """Above 1: the client sent it again, because a proxy went away before the first byte."""
    tokens: int = 0
    gap_s: float = 0.0
    """The client's longest wait for the first or the next part of the answer."""
    gap_ended_s: float = 0.0
    """When that wait was over."""
    detail: str = ""

    @property
    def begun(self) -> bool:
        """Part of an answer of status 200 had been sent: a failure broke a stream."""
        return self.first_s is not None and self.outcome is not Outcome.STATUS


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The mesh at one moment. None stands for what could not be asked then."""

    at_s: float
    redis: bool
    """Redis answered."""
    ready: frozenset[str] | None = None
    """Replicas that get new requests, by the registry."""
    leader: str | None = None
    """Name of the leading controller; "" when nobody leads."""
    holders: frozenset[str] | None = None
    """Proxies that the ledger knows."""
    members: dict[str, int] | None = None
    """`<kind>:<id>` → pid of each process that beats."""
    whole: bool | None = None
    """As many replicas READY as wanted, none of another revision, somebody leads, all members."""
    away: frozenset[str] | None = None
    """Proxies that do without the ledger now, or do not answer."""
    revisions: frozenset[str] | None = None
    """Of the replicas that get new requests."""
    redis_id: str | None = None
    """Which process Redis is, if it tells."""
    oldest_ms: int | None = None
    """When the oldest event was written that Redis holds; 0 if it holds none."""
    moved: float | None = None
    """Requests that went to another replica so far, by the proxies' own counts."""


class Second(msgspec.Struct, frozen=True, kw_only=True):
    """Traffic in one second of the run."""

    at_s: int
    requests: int
    """Requests that ended well."""
    failed: int
    tokens: int
    ttft_ms: float | None
    """Median time to first byte of the requests that began to be answered."""
    in_flight: int


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened, for people and on the time line."""

    at_s: float
    kind: str
    """`fault`, `heal`, `recovered`, `whole`, `exact`, or `event` for what the fleet said."""
    text: str


class Struck(msgspec.Struct, frozen=True, kw_only=True):
    """What the fault hit."""

    replicas: frozenset[str] = frozenset()
    member: str = ""
    """`<kind>:<id>` of the struck process, if it is a member of the fleet."""
    pid: int = 0
    """The pid it had."""
    proxy_url: str = ""
    """Where clients reached the struck proxy."""
    leader: str = ""
    """Who led before."""
    revision: str = ""
    """What is rolled out."""


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests came to, before they are judged."""

    driven: bool
    """False: live traffic was watched, so that texts and clients' retries are not known."""
    count: int
    ok: int
    failed: int
    """Ended badly before their first byte."""
    broken: int
    """Streams that broke midway or ended with another text."""
    own: int
    """Of these, streams that the struck proxy itself relayed."""
    resent: int
    """Requests that a client had to send again, to another proxy."""
    outcomes: dict[str, int]
    details: tuple[str, ...] = ()
    """Some of the failures in words."""
    ttft_before_ms: tuple[float, float] | None = None
    """Median and 99th percentile before the fault."""
    ttft_after_ms: tuple[float, float] | None = None
    """The same of requests that were in flight at the fault, or began later."""
    longest_gap_s: float = 0.0
    """Longest silence within any stream that was in flight at the fault or later."""
    compared: bool = False
    """Each text was compared with an undisturbed one."""


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What may be lost, and for how long. Each part can be set by `--budget`."""

    failed: int = 0
    """Requests that fail before their first byte."""
    broken: int = 0
    """Streams that break midway, or whose text differs."""
    resent: int | None = 0
    """Requests that clients must send again; None: any, because their proxy goes away."""
    spare_own: bool = False
    """Streams that the struck proxy itself relayed do not count."""
    recover_s: float = 10.0
    """Seconds until what the drill waits for is so again."""
    whole_s: float = 60.0
    """Seconds from the fault's end until the mesh is whole again."""
    drift: int = 0
    """Findings that an audit may still have at the end."""
    drift_s: float = 10.0
    """Seconds from the fault's end until an audit is clean."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the verdict."""

    name: str
    expected: str
    seen: str
    passed: bool


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Passed, if every check passed."""

    passed: bool
    checks: tuple[Check, ...]


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """All that was seen of one run: what the judge gets."""

    fault_s: float
    heal_s: float
    """When the fault ended: at once for a kill, later for what lasts."""
    answers_s: float | None
    """When Redis answered again after the fault; None if it always did, or never."""
    recovered_s: float | None
    """When what the drill waits for was so; None: not while it was watched."""
    whole_s: float | None
    """When the mesh was whole again."""
    exact_s: float | None
    """When an audit was clean again."""
    unclean: str = ""
    """What the last audit before that found first, in words."""
    drift: int
    """Findings of the last audit, after the load."""
    left: int
    """Requests that the ledger still held when the load was over."""
    sign: str = ""
    """What showed the fault, in words; empty if nothing did."""
    trespass: str = ""
    """What must never happen and did, such as a thawed leader that led on."""
    traffic: Traffic
