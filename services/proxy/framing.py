"""Where chunks end in a chunked body (RFC 9112 §7.1), without looking at what is in them.

A stream's chunks are passed on as they are, or taken out of their frames, once per read. Only
whole chunks are given away, so that a stream that breaks off can always be ended properly. What
costs least is what comes nearly always: a read that is one whole chunk.
"""

from typing import Final

LAST_CHUNK: Final = b"0\r\n\r\n"
MAX_LINE_BYTES: Final = 4096
"""Of a chunk's size with its extensions, or of all trailers."""
MAX_CHUNK_BYTES: Final = 64 << 20


class Chunks:
    """Reads one chunked body."""

    __slots__ = ("_framed", "_kept", "_kept_bytes", "_needed_bytes", "ended")

    def __init__(self, *, framed: bool) -> None:
        self._framed = framed
        """Give chunks with their frames."""
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._needed_bytes = 0
        self.ended = False
        """The last chunk has been read."""

    @property
    def between(self) -> bool:
        """Tell whether all that was read has been given away, and there is more to come."""
        return not (self._kept or self.ended)

    def take(self, data: bytes) -> bytes:
        """Take the next read; return the chunks that are whole now, and keep the rest.

        Raises ValueError where it is not a chunked body.
        """
        line = data.find(b"\r\n", 0, MAX_LINE_BYTES)
        if not self._kept and data[:line].isalnum() and data.endswith(b"\r\n"):
            length = int(data[:line], 16)
            if length and len(data) == line + 4 + length:
                return data if self._framed else data[line + 2 : -2]
        elif self._kept:
            self._kept.append(data)
            self._kept_bytes += len(data)
            if self._kept_bytes < self._needed_bytes:
                return b""
            data = b"".join(self._kept)
            self._kept.clear()
        size, at = len(data), 0
        bodies: list[bytes] | None = None if self._framed else []
        while at < size and (end := self._end(data, at, size)):
            if end < 0:
                return self._last(data, at, -end, bodies)
            if bodies is not None:
                bodies.append(data[data.find(b"\r\n", at) + 2 : end - 2])
            at = end
        if bodies is not None:
            return bodies[0] if len(bodies) == 1 else b"".join(bodies)
        return data if at == size else data[:at]

    def _end(self, data: bytes, at: int, size: int) -> int:
        """Find where the chunk at `at` ends; 0: it is kept, for it is not whole.

        Of the last chunk: where its first line ends, as a negative number.
        """
        line = data.find(b"\r\n", at, at + MAX_LINE_BYTES)
        if line < 0:
            if size - at > MAX_LINE_BYTES:
                raise ValueError("a chunk has no size")
            self._keep(data, at, size - at + 1)
            return 0
        length = _length(data[at:line])
        if not length:
            return -line - 2
        end = line + 4 + length
        if end > size:
            self._keep(data, at, end - at)
            return 0
        if data[end - 2 : end] != b"\r\n":
            raise ValueError("a chunk does not end where it should")
        return end

    def _last(self, data: bytes, at: int, after: int, bodies: list[bytes] | None) -> bytes:
        """Take the last chunk, whose line ends before `after`; trailers are dropped."""
        end = after + 2 if data.startswith(b"\r\n", after) else data.find(b"\r\n\r\n", after) + 4
        if end < after + 2:
            if len(data) - after > MAX_LINE_BYTES:
                raise ValueError("its trailers are too large")
            self._keep(data, at, len(data) - at + 1)
        else:
            if end != len(data):
                raise ValueError("it answered twice")
            self.ended = True
        if bodies is not None:
            return b"".join(bodies)
        return data[:at] + LAST_CHUNK if self.ended else data[:at]

    def _keep(self, data: bytes, at: int, needed_bytes: int) -> None:
        if needed_bytes > MAX_CHUNK_BYTES:
            raise ValueError("a chunk is too large")
        self._kept.append(data[at:])
        self._kept_bytes = len(data) - at
        self._needed_bytes = needed_bytes


def _length(line: bytes) -> int:
    """Read a chunk's size; raises ValueError."""
    if line.isalnum():
        return int(line, 16)
    digits = line.partition(b";")[0].rstrip(b" \t")
    if not digits.isalnum():
        raise ValueError("a chunk has no size")
    return int(digits, 16)
