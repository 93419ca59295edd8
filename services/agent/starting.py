"""From an order, or from a state file, to a living `Engine`.

Starting never raises: an engine that cannot be started is an engine that has ended, with a reason
a person can act on, whatever stands in its order. Adopting never restarts: what runs is taken over
as it is.
"""

import secrets
from collections.abc import Collection
from functools import partial

import structlog

from services.agent import adoption, proctree
from services.agent.engine import Engine, Tools
from services.agent.launch import Surroundings, find_files, plan_launch
from services.agent.ports import choose_port
from services.agent.probe import Endpoint
from services.agent.process import EngineProcess, end_tree, program_of
from services.agent.reconcile import Phase
from services.agent.statefile import EngineFile
from shared.errors import EngineError
from shared.models.deployment import EngineKind
from shared.models.order import Order
from shared.secret import replica_api_key

_log = structlog.get_logger(__name__)


class Starter:
    """Makes engines on this host."""

    def __init__(self, tools: Tools, surroundings: Surroundings) -> None:
        self._tools = tools
        self._surroundings = surroundings

    def start(
        self, order: Order, *, phase: Phase, taken: Collection[int], before: Engine | None
    ) -> Engine:
        """Start the engine of `order`, or begin with its external server at `phase`.

        `taken` are the ports of the other engines; `before` is the crashed engine that this one
        follows, on the same port.
        """
        restarts = before.restarts + 1 if before else 0
        try:
            if order.spec.engine.kind is EngineKind.EXTERNAL:
                return self._external(order, phase)
            return self._process(order, taken, before.port if before else 0, restarts)
        except (EngineError, OSError, ValueError, RuntimeError) as error:
            # What an order may hold is without end (a path that may not be searched, a user that
            # does not exist, a NUL in an argument), and no order may end the agent.
            self._tools.telemetry.engine_failures.inc()
            _log.error("engine_not_started", rid=order.rid, reason=str(error))
            return Engine(
                order=order,
                endpoint=Endpoint(url="", api_key=""),
                phase=Phase.ENDED,
                process=None,
                tools=self._tools,
                restarts=restarts,
                reason=str(error),
            )

    def adopt(self, file: EngineFile) -> Engine:
        """Take over the engine of `file` if it runs; else give it as ended, to be cleaned up."""
        running = adoption.find(file)
        if running is not None:
            process = EngineProcess.adopt(self._tools.folders, running)
            self._tools.telemetry.engine_adoptions.inc()
            _log.info("engine_adopted", rid=file.order.rid, pid=running.pid, warm=running.warm)
            return Engine(
                order=file.order,
                endpoint=self._endpoint(file.order, file.url),
                phase=Phase.READY if running.warm else Phase.STARTING,
                process=process,
                tools=self._tools,
                port=file.port,
                restarts=file.restarts,
            )
        _log.warning("engine_gone", rid=file.order.rid, pid=file.pid)
        said = self._tools.folders.last_words(file.order.rid)
        gone = Engine(
            order=file.order,
            endpoint=self._endpoint(file.order, file.url),
            phase=Phase.ENDED,
            process=None,
            tools=self._tools,
            port=file.port,
            restarts=file.restarts,
            reason="engine ended while the agent was away" + (f": {said}" if said else ""),
        )
        tree = partial(adoption.leftovers, file)
        gone.clean_with(partial(end_tree, tree, set(file.shared_memory)))
        return gone

    def _process(
        self, order: Order, taken: Collection[int], preferred: int, restarts: int
    ) -> Engine:
        settings = self._tools.settings
        files = find_files(order.spec.engine)
        port = choose_port(order.rid, settings.ports, taken, settings.engine_host, preferred)
        mark = secrets.token_hex(16)
        launch = plan_launch(order, port, files, self._surroundings, mark)
        file = EngineFile(
            order=order,
            port=port,
            url=f"http://{_bracketed(settings.address)}:{port}",
            mark=mark,
            boot=proctree.boot_id(),
            program=program_of(launch),
            restarts=restarts,
        )
        process = EngineProcess.start(self._tools.folders, file, launch)
        self._tools.telemetry.engine_starts.inc()
        if restarts:
            self._tools.telemetry.engine_restarts.inc()
        _log.info("engine_started", rid=order.rid, pid=process.file.pid, port=port)
        return Engine(
            order=order,
            endpoint=self._endpoint(order, file.url),
            phase=Phase.STARTING,
            process=process,
            tools=self._tools,
            port=port,
            restarts=restarts,
        )

    def _external(self, order: Order, phase: Phase) -> Engine:
        if not order.url.startswith(("http://", "https://")):
            raise EngineError(
                f"engine.urls holds {order.url!r}: give http:// or https:// and an address"
            )
        key, name = "", order.spec.engine.api_key_env
        if name is not None:
            key = self._surroundings.environ.get(name, "")
            if not key:
                raise EngineError(
                    f"engine.api_key_env names {name}, which is not set for the agent: set it on "
                    "agents and proxies"
                )
        return Engine(
            order=order,
            endpoint=Endpoint(url=order.url.rstrip("/").removesuffix("/v1"), api_key=key),
            phase=phase,
            process=None,
            tools=self._tools,
        )

    def _endpoint(self, order: Order, url: str) -> Endpoint:
        key = replica_api_key(self._surroundings.fleet_secret, order.rid, order.gen)
        return Endpoint(url=url, api_key=key)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
