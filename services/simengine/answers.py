"""The two ways to answer: collected and sent whole, or streamed as server-sent events.

Both are sinks for runs; what differs between APIs is only how results and chunks are written,
which the API rooms give. A slow client does not slow the engine: its tokens gather here and go
out together in one chunk when it reads again, as in vLLM.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from services.simengine.engine import Engine, Run
from services.simengine.refusals import RefusalError
from services.simengine.wire import Exchange


class Result:
    """What one run has produced so far."""

    __slots__ = ("finish", "ids", "pieces", "run", "stop")

    def __init__(self, run: Run) -> None:
        self.run = run
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.finish: str | None = None
        self.stop: str | int | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)


class Answer:
    """What both sinks do: admit the runs, and abort them when the client goes."""

    def __init__(self, engine: Engine, exchange: Exchange, name: str) -> None:
        self.name = name
        self.exchange = exchange
        self.runs: list[Run] = []
        self._engine = engine
        self._open = 0
        self._copies = 1

    def start(self, runs: list[Run], *, copies: int = 1) -> None:
        """Submit the runs, `copies` of each prompt; raises the refusal of a full engine."""
        self._engine.submit(runs)
        self.runs = runs
        self._copies = copies
        self._open = len(runs)
        self.exchange.on_gone = self._abort

    def cut(self) -> None:
        """Drop the connection and the other runs of this request."""
        self.exchange.cut()
        self._abort()

    def _abort(self) -> None:
        self._engine.abort(self.runs)

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of the request: each prompt once, however many choices it has."""
        return sum(run.scheduled.prompt_tokens for run in self.runs[:: self._copies])

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far in all choices."""
        return sum(run.produced for run in self.runs)


class CollectedAnswer(Answer):
    """Waits for all runs and answers once with what `body` makes of them."""

    def __init__(
        self,
        engine: Engine,
        exchange: Exchange,
        name: str,
        body: Callable[["CollectedAnswer", list[Result]], bytes],
    ) -> None:
        super().__init__(engine, exchange, name)
        self._body = body
        self._results: list[Result] = []

    def start(self, runs: list[Run], *, copies: int = 1) -> None:
        """Submit the runs."""
        self._results = [Result(run) for run in runs]
        super().start(runs, copies=copies)

    def token(
        self, run: Run, token_id: int, shown: str, finish: str | None, stop: str | int | None
    ) -> None:
        """Collect; answer after the last run's last token."""
        result = self._results[run.index]
        result.ids.append(token_id)
        if shown:
            result.pieces.append(shown)
        if finish is not None:
            result.finish, result.stop = finish, stop
            self._open -= 1
            if not self._open:
                self.exchange.reply(200, self._body(self, self._results))

    def fail(self, error: RefusalError) -> None:
        """Answer with the error."""
        self.exchange.reply(error.status, error.openai_body())


class StreamedAnswer(Answer, ABC):
    """Streams events. A subclass writes them: `chunk` per token, `closing` at the end."""

    def __init__(self, engine: Engine, exchange: Exchange, name: str) -> None:
        super().__init__(engine, exchange, name)
        self._held: dict[int, tuple[Run, list[int], list[str]]] = {}

    def start(self, runs: list[Run], *, copies: int = 1) -> None:
        """Submit the runs and send the head of the answer."""
        super().start(runs, copies=copies)
        self.exchange.on_writable = self._flush
        self.exchange.begin_stream()

    @abstractmethod
    def chunk(
        self, run: Run, ids: Sequence[int], shown: str, finish: str | None, stop: str | int | None
    ) -> bytes:
        """Return the event(s) for one or more tokens of a run."""

    @abstractmethod
    def closing(self) -> bytes:
        """Return what ends the stream after the last run's last chunk."""

    @abstractmethod
    def failure(self, error: RefusalError) -> bytes:
        """Return the events of a stream whose engine has died."""

    def token(
        self, run: Run, token_id: int, shown: str, finish: str | None, stop: str | int | None
    ) -> None:
        """Send the token now, or hold it while the client is slow."""
        ids: Sequence[int] = (token_id,)
        if self._held or self.exchange.paused:
            _, held_ids, held_pieces = self._held.setdefault(run.index, (run, [], []))
            held_ids.append(token_id)
            held_pieces.append(shown)
            if finish is None:
                return
            del self._held[run.index]
            ids, shown = held_ids, "".join(held_pieces)
        data = self.chunk(run, ids, shown, finish, stop)
        if finish is not None:
            self._open -= 1
            if not self._open:
                self.exchange.end(data + self.closing())
                return
        self.exchange.write(data)

    def fail(self, error: RefusalError) -> None:
        """End the stream with the error event, HTTP 200 and a clean end of chunks."""
        self.exchange.end(self.failure(error))

    def _flush(self) -> None:
        held, self._held = self._held, {}
        for run, ids, pieces in held.values():
            self.exchange.write(self.chunk(run, ids, "".join(pieces), None, None))
