"""A TCP link to Redis that a test can spoil: slow, silent, deaf, cut, or leading elsewhere.

The link is a process of its own, so that a busy test does not slow it down. It reads one JSON
command a line and answers each with a line once it is in force. A blackholed link accepts
connections and takes what is sent, as a host behind a dead route seems to; a mute one carries
commands and swallows the replies, so that what was asked is done although nobody hears of it.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, Self

ROOT: Final = Path(__file__).resolve().parents[2]
PART_BYTES: Final = 1 << 16


class Link:
    """A running link, as the test holds it."""

    def __init__(self, target_port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.redis_link", str(target_port)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self._ask({}))
        """Where clients connect."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.kill()
        self._process.communicate()

    def url(self, password: str = "") -> str:
        """Give a URL through this link."""
        return f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"

    def slow(self, each_way_s: float) -> None:
        """Delay everything, each way."""
        self._ask({"delay_s": each_way_s})

    def blackhole(self) -> None:
        """Carry nothing any more, and tell nobody."""
        self._ask({"up": False, "down": False})

    def mute(self) -> None:
        """Carry commands, swallow replies."""
        self._ask({"up": True, "down": False})

    def heal(self) -> None:
        """Carry everything at once again. What was swallowed has been lost: cut, as TCP would."""
        self._ask({"up": True, "down": True, "delay_s": 0.0, "cut": True})

    def lead_to(self, port: int, *, cut: bool) -> None:
        """Lead new connections to another port; with `cut` the old ones end."""
        self._ask({"target": port, "cut": cut})

    def _ask(self, command: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        assert answer, "the link has ended"
        return answer


class _Carrier:
    """The link's own process."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.up = True
        self.down = True
        self.delay_s = 0.0
        self._open: set[asyncio.StreamWriter] = set()
        self._carrying: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until stdin ends."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        while line := await asyncio.to_thread(sys.stdin.readline):
            command: dict[str, Any] = json.loads(line)
            cut = command.pop("cut", False)
            for name, value in command.items():
                setattr(self, name, value)
            if cut:
                for writer in list(self._open):
                    writer.transport.abort()
            sys.stdout.write(f"{port}\n")
            sys.stdout.flush()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while not (self.up or self.down):
                await asyncio.sleep(0.05)  # the test heals the link by cutting it
                if writer.is_closing():
                    return
            there, onward = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        finally:
            self._open.discard(writer)
        self._open |= {writer, onward}
        ways = [
            asyncio.ensure_future(self._carry(reader, onward, "up")),
            asyncio.ensure_future(self._carry(there, writer, "down")),
        ]
        self._carrying.update(ways)
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        self._carrying.difference_update(ways)
        for end in (writer, onward):
            self._open.discard(end)
            end.transport.abort()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str
    ) -> None:
        loop = asyncio.get_running_loop()
        due_s = 0.0
        with contextlib.suppress(OSError):
            while part := await reader.read(PART_BYTES):
                if not getattr(self, way):
                    continue
                # Never before what came earlier: a delay that ends must not reorder the stream.
                due_s = max(due_s + 1e-6, loop.time() + self.delay_s)
                if due_s > loop.time():
                    loop.call_at(due_s, writer.write, part)
                else:
                    writer.write(part)


if __name__ == "__main__":
    asyncio.run(_Carrier(int(sys.argv[1])).run())
