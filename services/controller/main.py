"""Runs one controller until it is told to stop."""

import os
from importlib import metadata

from services.controller.app import Controller
from services.controller.probing import HttpProber
from services.controller.remembering import remember
from services.controller.settings import ControllerSettings, check
from shared import logs
from shared.admin import AdminServer, health_routes, metrics_route
from shared.clock import SystemClock
from shared.errors import RedmeshError
from shared.lifecycle import Loops, run_until_stopped, stop_signals
from shared.models.host import Member, MemberKind
from shared.registry import open_registry


async def run(settings: ControllerSettings) -> int:
    """Serve until SIGTERM or SIGINT, then resign and return 0.

    Raises InvalidInputError for settings that make no sense, the registry's errors when Redis
    cannot be used at the start, and RedmeshError when the admin port is taken.
    """
    check(settings)
    logs.configure(level=settings.log_level, style=settings.log_format, service="controller")
    clock = SystemClock()
    owner = settings.identity()
    registry = await open_registry(settings)
    prober = HttpProber(settings.fleet_secret, os.environ, settings.probe_deadline_s)
    controller = Controller(settings, registry, prober, clock, owner)
    routes = {
        **health_routes(controller.not_ready),
        **metrics_route(controller.metrics.registry),
    }
    admin = AdminServer(settings.admin_host, settings.admin_port, routes)
    try:
        with stop_signals() as stop:
            try:
                await admin.__aenter__()
            except OSError as error:
                raise RedmeshError(
                    f"cannot listen on {settings.admin_host}:{settings.admin_port} "
                    f"({error.strerror}): give another --admin-port, or 0 for any free one"
                ) from error
            member = Member(
                kind=MemberKind.CONTROLLER,
                id=owner,
                host=settings.host_name,
                pid=os.getpid(),
                version=metadata.version("redmesh"),
                started_ms=clock.now_ms(),
                admin_url=admin.url,
            )
            async with Loops() as loops:
                controller.start(loops, member)
                loops.start("remember", remember(registry, clock, owner))
                await run_until_stopped(stop, loops)
            await controller.leave(member)
    finally:
        await admin.__aexit__()
        await registry.aclose()
    return 0
