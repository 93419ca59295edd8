"""Progress of something that takes time: a live line in a terminal, else a line per change."""

import contextlib
import time
from collections.abc import Generator

from rich.console import Console
from rich.status import Status
from rich.text import Text


class Shower:
    """Shows where something stands. `now` replaces the line, `say` adds one that stays."""

    def __init__(self, console: Console, status: Status | None) -> None:
        self._console = console
        self._status = status
        self._last = ""
        self._began_s = time.monotonic()

    def now(self, text: str) -> None:
        """Show the present state."""
        if self._status is not None:
            elapsed_s = time.monotonic() - self._began_s
            self._status.update(Text(f"{text} ({elapsed_s:.0f} s)"))
        elif text != self._last:
            self.say(text)
        self._last = text

    def say(self, text: str) -> None:
        """Add a line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def shower() -> Generator[Shower]:
    """Show progress on stderr: stdout is for the result."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Shower(console, None)
        return
    with console.status("starting") as status:
        yield Shower(console, status)
