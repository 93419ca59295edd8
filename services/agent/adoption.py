"""Which engines of an earlier agent process still run, and what is left of those that do not.

An engine is the one of a state file if its pid, its start time and the machine's boot are the
same: the kernel gives no two processes all three. A state file without a pid was written by an
agent that died in the middle of a start; the mark in the process's environment finds that engine.
"""

import msgspec

from services.agent import proctree
from services.agent.proctree import Process
from services.agent.statefile import EngineFile


def is_the_one(file: EngineFile, found: Process | None, boot: str) -> bool:
    """Tell whether `found` is the living main process that `file` describes. Pure."""
    return (
        found is not None
        and not found.zombie
        and file.boot == boot
        and found.pid == file.pid
        and found.started_ticks == file.started_ticks
    )


def find(file: EngineFile) -> EngineFile | None:
    """Find the engine of `file` and return the file with its pid; None when it does not run."""
    boot = proctree.boot_id()
    if file.pid == 0:
        leader = proctree.find_leader(file.mark) if file.boot == boot else None
        if leader is None or leader.zombie:
            return None
        return msgspec.structs.replace(file, pid=leader.pid, started_ticks=leader.started_ticks)
    return file if is_the_one(file, proctree.look_at(file.pid), boot) else None


def leftovers(file: EngineFile) -> list[Process]:
    """List the processes that the dead engine of `file` left behind; its session tells them."""
    if file.pid == 0 or file.boot != proctree.boot_id():
        return []
    return proctree.engine_tree(file.pid, file.mark, file.program)
