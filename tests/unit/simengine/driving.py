"""How these tests read streams and hold engines."""

import json
import subprocess
from typing import Any

import httpx
import msgspec

from services.simengine.main import Simulator


class Started:
    """An engine in the test's loop, and a client for it."""

    def __init__(self, simulator: Simulator, client: httpx.AsyncClient) -> None:
        self.simulator = simulator
        self.client = client

    async def post(self, path: str, **body: object) -> httpx.Response:
        """POST a JSON body."""
        return await self.client.post(path, json=body)

    async def ok(self, path: str, **body: object) -> dict[str, Any]:
        """POST a JSON body and return the JSON of a 200."""
        response = await self.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()

    async def stream(self, path: str, **body: object) -> "Stream":
        """POST with `stream` and read to the end."""
        response = await self.post(path, stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return read_stream(response.text)


class Stream(msgspec.Struct, kw_only=True):
    """A stream read to its end."""

    chunks: list[dict[str, Any]]
    names: list[str]
    done: bool

    @property
    def choices(self) -> list[dict[str, Any]]:
        """The first choice of every chunk that has one."""
        return [chunk["choices"][0] for chunk in self.chunks if chunk.get("choices")]

    @property
    def text(self) -> str:
        """All text of a chat or completion stream."""
        return "".join(
            choice["text"] if "text" in choice else choice["delta"].get("content", "")
            for choice in self.choices
        )

    @property
    def ids(self) -> list[int]:
        """All token ids of the stream."""
        ids: list[int] = []
        for choice in self.choices:
            ids += choice.get("token_ids") or []
        return ids

    @property
    def finish(self) -> tuple[str | None, str | int | None]:
        """The last chunk's finish and stop reason."""
        last = self.choices[-1]
        return last["finish_reason"], last.get("stop_reason")


def read_stream(text: str) -> Stream:
    """Parse server-sent events."""
    chunks: list[dict[str, Any]] = []
    names: list[str] = []
    done = False
    for line in text.splitlines():
        if line == "data: [DONE]":
            done = True
        elif line.startswith("data: "):
            chunks.append(json.loads(line.removeprefix("data: ")))
        elif line.startswith("event: "):
            names.append(line.removeprefix("event: "))
    return Stream(chunks=chunks, names=names, done=done)


class EngineProcess:
    """An engine in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = ""

    def read_port(self) -> None:
        """Wait for the one line an engine writes when it listens."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "listening on" in line, line
        self.url = line.split()[4]

    def end(self) -> None:
        """Kill what still runs and close the pipes."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=10)
