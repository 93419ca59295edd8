"""Entry point of the agent: settings in, exit status out. Used by `redmesh agent`."""

import asyncio
import os
import sys
from pathlib import Path

from services.agent.app import Agent, only_agent_of
from services.agent.settings import AgentSettings, check
from shared import logs
from shared.clock import SystemClock
from shared.errors import InvalidInputError, RedmeshError


def run(settings: AgentSettings) -> int:
    """Run the agent until SIGTERM; 0 after a clean end, 2 for bad settings, 1 for what is missing.

    An error at the start is one clear message on stderr.
    """
    logs.configure(level=settings.log_level, style=settings.log_format, service="agent")
    try:
        check(settings)
        state_dir = Path(settings.state_dir).expanduser().absolute()
        with only_agent_of(state_dir):
            asyncio.run(_run(settings, state_dir))
    except InvalidInputError as error:
        return _fail(str(error), 2)
    except RedmeshError as error:
        return _fail(str(error), 1)
    except OSError as error:
        where = f"{settings.admin_host}:{settings.admin_port}"
        return _fail(f"admin port {where} cannot be used: {error.strerror or error}", 1)
    return 0


async def _run(settings: AgentSettings, state_dir: Path) -> None:
    await Agent(settings, SystemClock(), os.environ, state_dir).run()


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"redmesh agent: {message}\n")
    return status
