"""Settings of the controller."""

from shared.errors import InvalidInputError
from shared.ids import is_name, new_suffix, slug
from shared.settings import CommonSettings, variable


class ControllerSettings(CommonSettings, frozen=True, kw_only=True):
    """What one controller needs; all controllers of a fleet should have the same timing."""

    controller_name: str = ""
    """Name of this process in the fleet; empty makes one from the host's name."""
    admin_host: str = "127.0.0.1"
    """Address of health and metrics."""
    admin_port: int = 0
    """Port of health and metrics; 0 takes any free port."""
    lease_ttl_ms: int = 5_000
    """How long leadership lasts without a renewal; a leader acts for at most 70 % of it."""
    interval_s: float = 1.0
    """Seconds between two looks at the fleet; changes of routes wake the leader earlier."""
    settle_s: float = 3.0
    """Seconds after Redis' or leadership's return in which nobody is judged by old heartbeats."""
    probe_deadline_s: float = 2.0
    """Seconds that a silent replica's engine gets to answer the leader."""

    def identity(self) -> str:
        """Name this process; two processes never share a name, so that fences tell them apart."""
        return f"{self.controller_name or 'ct-' + slug(self.host_name)}-{new_suffix()}"


def check(settings: ControllerSettings) -> None:
    """Raise one `InvalidInputError` that lists every setting that makes no sense."""
    problems: list[str] = []
    if settings.controller_name and not is_name(settings.controller_name):
        problems.append(
            f"{variable('controller_name')}={settings.controller_name!r}: use letters, digits "
            "and . _ : / @ + - only"
        )
    if not 0 <= settings.admin_port <= 65_535:
        problems.append(f"{variable('admin_port')}={settings.admin_port}: use 0 to 65535")
    if not 1_000 <= settings.lease_ttl_ms <= 60_000:
        problems.append(f"{variable('lease_ttl_ms')}={settings.lease_ttl_ms}: use 1000 to 60000")
    problems += [
        f"{variable(name)}={value:g}: use {low:g} to {high:g} seconds"
        for name, value, low, high in (
            ("interval_s", settings.interval_s, 0.05, 60.0),
            ("settle_s", settings.settle_s, 0.0, 300.0),
            ("probe_deadline_s", settings.probe_deadline_s, 0.05, 30.0),
        )
        if not low <= value <= high
    ]
    if problems:
        raise InvalidInputError("\n".join(problems))
