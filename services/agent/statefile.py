"""One folder for each engine: what it is (`engine.json`) and what it said (`engine.log`).

The state file is what an agent adopts by after its own death, so it is written whole or not at
all, before the engine is started (with a mark but no pid yet) and again right after. It holds no
secret: keys are derived anew.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Final

import msgspec

from shared.models.order import Order

_FOLDER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ERROR_LINE: Final = re.compile(r"(?:[\w.]*(?:Error|Exception)|.{0,40}\berror): \S")
_PREFIX: Final = re.compile(r"^(?:\([^)]*\) )?(?:[A-Z]+ \d\d-\d\d [\d:]+ \[[^]]*\] ?)?")
_SEQUELS: Final = ("Engine core initialization failed", "EngineDeadError")
"""vLLM's last errors name only the consequence; the cause stands further up."""
TAIL_READ_BYTES: Final = 64 << 10
REASON_CHARS: Final = 300
LOG_KEEP_BYTES: Final = 16 << 20
ENDED_FOLDERS_KEPT: Final = 20


class EngineFile(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a started engine."""

    order: Order
    port: int
    url: str
    mark: str
    """Random; stands in the environment of every process of the tree."""
    boot: str
    program: str
    """Real path of the executable that the engine's processes run."""
    pid: int = 0
    """Also the session's id; 0 while the engine is being started."""
    started_ticks: int = 0
    warm: bool = False
    """It has answered its warm-up, so an agent that adopts it need not doubt it."""
    restarts: int = 0
    shared_memory: tuple[str, ...] = ()
    """Files of /dev/shm that the tree had mapped when last looked at."""


class EngineFolders:
    """The folders of all engines below `<state_dir>/engines`."""

    def __init__(self, state_dir: Path) -> None:
        self._root = state_dir / "engines"

    def folder(self, rid: str) -> Path:
        """Return the folder of `rid`. The caller has checked `rid` with `is_folder_name`."""
        return self._root / rid

    def log(self, rid: str) -> Path:
        """Return the path of the engine's log."""
        return self.folder(rid) / "engine.log"

    def write(self, file: EngineFile) -> None:
        """Replace the state file of its replica atomically; durable against a crash of the host."""
        folder = self.folder(file.order.rid)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "engine.json.new"
        with temporary.open("wb") as out:
            out.write(msgspec.json.format(msgspec.json.encode(file)))
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(folder / "engine.json")

    def forget(self, rid: str) -> None:
        """Drop the state file of `rid`; its log stays, among the last few of ended engines."""
        (self.folder(rid) / "engine.json").unlink(missing_ok=True)
        if not self._root.is_dir():
            return
        ended = [
            folder
            for folder in self._root.iterdir()
            if folder.is_dir() and not (folder / "engine.json").exists()
        ]
        ended.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        for folder in ended[ENDED_FOLDERS_KEPT:]:
            shutil.rmtree(folder, ignore_errors=True)

    def read_all(self) -> tuple[list[EngineFile], list[Path]]:
        """Read every state file; the second list names those that do not parse."""
        files: list[EngineFile] = []
        corrupt: list[Path] = []
        for path in sorted(self._root.glob("*/engine.json")):
            try:
                files.append(msgspec.json.decode(path.read_bytes(), type=EngineFile))
            except (OSError, msgspec.MsgspecError):
                corrupt.append(path)
        return files, corrupt

    def open_log(self, rid: str) -> int:
        """Open the log of `rid` for appending and return its descriptor; a long one starts anew."""
        path = self.log(rid)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > LOG_KEEP_BYTES:
            path.replace(path.with_suffix(".log.1"))
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)

    def last_words(self, rid: str, *, cause_only: bool = False) -> str:
        """Return what the engine's log says of its end, at most `REASON_CHARS` characters.

        With `cause_only`, that is an error that is a cause, or nothing.
        """
        try:
            with self.log(rid).open("rb") as log:
                log.seek(max(0, self.log(rid).stat().st_size - TAIL_READ_BYTES))
                text = log.read(TAIL_READ_BYTES).decode(errors="replace")
        except OSError:
            return ""
        return summary(text, cause_only=cause_only)


def is_folder_name(rid: str) -> bool:
    """Tell whether `rid` may name a folder: orders come from Redis, which others may write."""
    return _FOLDER_NAME.fullmatch(rid) is not None


def summary(log: str, *, cause_only: bool = False) -> str:
    """Choose what a person needs from the end of an engine's log: its last cause, or its tail."""
    lines = [_PREFIX.sub("", line).strip() for line in log.splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    causes = [line for line in errors if not any(sequel in line for sequel in _SEQUELS)]
    if causes:
        cause = causes[-1]
        return cause if len(cause) <= REASON_CHARS else cause[: REASON_CHARS - 1] + "…"
    if cause_only:
        return ""
    tail = " | ".join(errors[-1:] or lines[-3:])
    return tail if len(tail) <= REASON_CHARS else "…" + tail[1 - REASON_CHARS :]
