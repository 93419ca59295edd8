"""Settings of the agent, and the checks that need more than one field or the machine."""

import os
from pathlib import Path
from typing import Final

import msgspec

from shared.errors import InvalidInputError
from shared.settings import CommonSettings, variable

MIN_PORT: Final = 1024
MAX_PORT: Final = 65535


class AgentSettings(CommonSettings, frozen=True, kw_only=True):
    """What the agent of one host needs."""

    address: str = "127.0.0.1"
    """Where proxies reach this host's replicas: an IP address or a DNS name."""
    engine_host: str = "127.0.0.1"
    """Address that engines bind. Keep it where only proxies reach it: an engine's key does not
    protect every route of it."""
    port_range: str = "18000-18999"
    """Ports for engines, first and last."""
    state_dir: str = ".redmesh/agent"
    """Where engines' state files and logs live; what adoption after a restart reads."""
    engine_python: str = ""
    """Python of the environment that holds vLLM; empty means `.engine/bin/python` here."""
    gpus: str = "auto"
    """`auto` (all that are found), `none`, or indices such as `0,2`."""
    max_replicas: int = 64
    """Most replicas this host takes."""
    admin_host: str = "127.0.0.1"
    """Address of health and metrics."""
    admin_port: int = 0
    """Port of health and metrics; 0 takes any free port."""
    stop_engines_on_exit: bool = False
    """On SIGTERM drain and stop the engines too. False: they go on, and are adopted later."""
    exit_drain_s: float = 30.0
    """With `stop_engines_on_exit`: seconds that requests in flight get to finish."""
    orders_interval_s: float = 0.5
    """Seconds between two looks at the orders."""
    beat_interval_s: float = 1.0
    """Seconds between heartbeats."""
    probe_interval_s: float = 5.0
    """Seconds between probes of an engine that answers."""
    probe_deadline_s: float = 4.0
    """Seconds that a probe's one token may take."""
    probe_misses: int = 3
    """Misses in a row that make a replica UNHEALTHY."""
    metrics_interval_s: float = 2.0
    """Seconds between readings of an engine's load."""
    orphan_grace_s: float = 600.0
    """How long an engine that nobody orders, records or declares is kept."""
    drills_allowed: bool = False
    """Whether `redmesh drill` may kill and freeze engines of this host through Redis."""

    @property
    def engine_python_path(self) -> Path:
        """Path of the engine environment's Python. Its symlink is kept: it names the venv."""
        return Path(os.path.abspath(self.engine_python or ".engine/bin/python"))  # noqa: PTH100 - resolve() would leave the venv

    @property
    def ports(self) -> range:
        """Ports that engines may take."""
        return parse_ports(self.port_range)


def parse_ports(text: str) -> range:
    """Parse `first-last`, both included; raise `InvalidInputError` for anything else."""
    first, dash, last = text.partition("-")
    if dash and first.strip().isdigit() and last.strip().isdigit():
        low, high = int(first), int(last)
        if MIN_PORT <= low <= high <= MAX_PORT:
            return range(low, high + 1)
    raise InvalidInputError(
        f"{variable('port_range')}={text!r}: give first-last, such as 18000-18999, "
        f"within {MIN_PORT}-{MAX_PORT}",
        field="port_range",
    )


def parse_gpus(text: str) -> frozenset[int] | None:
    """Parse the `gpus` setting: None means all of them, an empty set none."""
    if text == "auto":
        return None
    if text == "none":
        return frozenset()
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdigit() for part in parts):
        return frozenset(int(part) for part in parts)
    raise InvalidInputError(
        f"{variable('gpus')}={text!r}: give auto, none, or indices such as 0,1", field="gpus"
    )


def check(settings: AgentSettings) -> None:
    """Raise one `InvalidInputError` that lists every problem of `settings`."""
    problems: list[str] = []
    for parse, text in ((parse_ports, settings.port_range), (parse_gpus, settings.gpus)):
        try:
            parse(text)
        except InvalidInputError as error:
            problems.append(str(error))
    if not settings.fleet_secret:
        problems.append(
            f"{variable('fleet_secret')} is not set: give all agents and proxies the same secret "
            f"by {variable('fleet_secret')} or {variable('fleet_secret')}_FILE"
        )
    for field in msgspec.structs.fields(AgentSettings):
        value: object = getattr(settings, field.name)
        if field.name.endswith("_s") and isinstance(value, float) and value <= 0:
            problems.append(f"{variable(field.name)}={value:g}: give seconds above 0")
    if settings.max_replicas < 1 or settings.probe_misses < 1:
        problems.append(
            f"{variable('max_replicas')} and {variable('probe_misses')} must be at least 1"
        )
    if problems:
        raise InvalidInputError("\n".join(problems))
