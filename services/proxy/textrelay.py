"""Turning a replica's chat stream into plain text, for `text/plain` requests."""

from services.proxy.client import Outlet
from services.proxy.plaintext import TextStream
from services.proxy.refusals import Dialect, Refusal
from services.proxy.relay import Relay, Step
from services.proxy.retry import ENGINE_DEAD, Failure


class TextRelay(Relay):
    """Gives the text of a chat stream. An answer that breaks off is cut, never ended cleanly."""

    def __init__(
        self, client: Outlet, *, request_id: bytes, dialect: Dialect, model: str, path: str
    ) -> None:
        super().__init__(client, request_id=request_id, dialect=dialect, model=model, path=path)
        self._text = TextStream()

    def usual(self, data: bytes) -> bool:
        """Look at everything: text is taken out of its events."""
        del data
        return False

    def reset(self) -> None:
        """Forget a try that came to nothing."""
        super().reset()
        if not self.client.started:
            self._text = TextStream()

    def break_off(self, refusal: Refusal) -> bool:
        """Plain text has no words for an error: the connection must be cut."""
        del refusal
        return False

    def _feed_stream(self, data: bytes, *, complete: bool) -> Step:
        first = not self.client.started
        reader = self._text
        self._tokens += data.count(b"\n\n")
        text = reader.feed(data)
        if complete and not reader.finished and not reader.error:
            reader.error = "the replica ended the stream without a finish reason"
        if reader.error:
            if first:
                dead = ENGINE_DEAD.decode() in reader.error
                return self._fail(Failure.ENGINE_DEAD if dead else Failure.GATEWAY, reader.error)
            if text:
                self.client.write(text, more=True)
            self.detail = reader.error
            return Step.BROKEN
        if not text and not complete:
            return Step.GOES_ON
        self._write_text(text, last=complete)
        if first:
            return Step.STARTED
        return Step.ENDED if complete else Step.GOES_ON

    def _deliver(self, events: bytes, *, last: bool) -> None:
        text = self._text.feed(events)
        if text or last:
            self._write_text(text, last=last)

    def _write_text(self, text: bytes, *, last: bool) -> None:
        if not self.client.started:
            self.client.start(
                200,
                [
                    (b"content-type", b"text/plain; charset=utf-8"),
                    (b"x-request-id", self._request_id),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),
                ],
            )
        self.client.write(text, more=not last)
