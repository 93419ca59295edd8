"""How a drill tells the links of a mesh what to be: one file, level-triggered, that expires.

The drill replaces `links.json` in the state directory; the process of the links reads it twenty
times a second and answers with the wish's id in `links.seen`. Cuts end by themselves at `until_s`,
so that a drill that is killed leaves no mesh cut for good. Where Redis is stays as it was said.
"""

import asyncio
import os
import secrets
import time
from pathlib import Path
from typing import Final

import msgspec

from services.cli.link import Cut
from services.cli.statedir import StateDir
from shared.errors import RedmeshError

SEEN_DEADLINE_S: Final = 5.0
POLL_S: Final = 0.05


class LinkWish(msgspec.Struct, frozen=True, kw_only=True):
    """What the links shall be."""

    id: str = ""
    until_s: float = 0.0
    """Seconds since the epoch; cuts are over then."""
    cuts: tuple[Cut, ...] = ()
    redis: tuple[str, int] | None = None
    """Where new connections to Redis go; None: to the Redis that `up` started."""


def wish_file(state: StateDir) -> Path:
    """Name the file of the wish."""
    return state.path / "links.json"


def seen_file(state: StateDir) -> Path:
    """Name the file of the answer."""
    return state.path / "links.seen"


def read(state: StateDir) -> LinkWish:
    """Read the wish; one that is not there or does not parse is no wish."""
    try:
        return msgspec.json.decode(wish_file(state).read_bytes(), type=LinkWish)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return LinkWish()


async def tell(
    state: StateDir, *, cuts: tuple[Cut, ...], redis: tuple[str, int] | None, hold_s: float = 0.0
) -> None:
    """Say what the links shall be, and wait until they are so."""
    wish = LinkWish(id=secrets.token_hex(8), until_s=time.time() + hold_s, cuts=cuts, redis=redis)
    replace(wish_file(state), msgspec.json.encode(wish))
    until_s = time.monotonic() + SEEN_DEADLINE_S
    while _seen(state) != wish.id:
        if time.monotonic() >= until_s:
            raise RedmeshError(
                f"the links of {state.path} do not answer: look at {state.log('links')}"
            )
        await asyncio.sleep(POLL_S / 2)


def replace(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    temporary.write_bytes(content)
    temporary.replace(path)


def _seen(state: StateDir) -> str:
    try:
        return seen_file(state).read_text(encoding="utf-8")
    except OSError:
        return ""
