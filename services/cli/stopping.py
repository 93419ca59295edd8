"""Ends a mesh: asks its supervisor, or cleans up what a killed supervisor left. Nothing else.

A process is touched only when pid and start time are those that were recorded, or when it carries
the mesh's mark in its environment.
"""

import signal
from typing import Final

from services.cli import processes
from services.cli.meshplan import AGENT_STAGE, CONTROLLER_STAGE, LINKS_STAGE, PROXY_STAGE
from services.cli.processes import ProcessRef
from services.cli.redisserver import LAST_STAGE
from services.cli.statedir import Mesh, StateDir

SUPERVISOR_SLACK_S: Final = 10.0


def stop(state: StateDir, mesh: Mesh, *, timeout_s: float | None = None) -> bool:
    """End the mesh and remove its run files; tell whether its supervisor did it in order.

    Without `timeout_s` every stage gets its full time.
    """
    supervisor = mesh.supervisor
    orderly = supervisor is not None and processes.alive(supervisor)
    if supervisor is not None and orderly:
        processes.send([supervisor], signal.SIGTERM)
        full_s = sum(_stage_timeouts(mesh).values()) + SUPERVISOR_SLACK_S
        if processes.wait_gone([supervisor], full_s if timeout_s is None else timeout_s):
            processes.send([supervisor], signal.SIGTERM)  # the second one hurries
            if processes.wait_gone([supervisor], SUPERVISOR_SLACK_S * 2):
                processes.send([supervisor], signal.SIGKILL)
                orderly = False
    _clean_up(state, mesh, hurry=timeout_s is not None)
    return orderly


def _clean_up(state: StateDir, mesh: Mesh, *, hurry: bool) -> None:
    """Stop what is left, stage by stage as the supervisor would, then whatever has the mark."""
    current = state.read_mesh()
    running = (current or mesh).running
    for stage in (PROXY_STAGE, CONTROLLER_STAGE, AGENT_STAGE, LINKS_STAGE, LAST_STAGE):
        refs = [
            running[child.name]
            for child in mesh.children
            if child.stage == stage and child.name in running
        ]
        _end(refs, 2.0 if hurry else _stage_timeouts(mesh).get(stage, 0.0))
        if stage == AGENT_STAGE:
            _sweep_engines(mesh, running)
    processes.sweep(mesh.id, grace_s=5.0)
    state.clear_run_files()


def _sweep_engines(mesh: Mesh, running: dict[str, ProcessRef]) -> None:
    """End engines that no agent is left to stop, before their Redis goes."""
    pids = {ref.pid for ref in running.values()}
    engines = [ref for ref in processes.marked(mesh.id) if ref.pid not in pids]
    _end(engines, 5.0)


def _end(refs: list[ProcessRef], timeout_s: float) -> None:
    processes.send(refs, signal.SIGTERM)
    left = processes.wait_gone(refs, timeout_s)
    processes.send(left, signal.SIGKILL)
    processes.wait_gone(left, 2.0)


def _stage_timeouts(mesh: Mesh) -> dict[int, float]:
    timeouts: dict[int, float] = {}
    for child in mesh.children:
        timeouts[child.stage] = max(timeouts.get(child.stage, 0.0), child.stop_timeout_s)
    return timeouts
