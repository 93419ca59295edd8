"""Health and metrics on the public port: the same words as on the admin port."""

from collections.abc import Awaitable, Callable
from typing import Any

from litestar import Response, get
from litestar.exceptions import ServiceUnavailableException
from litestar.handlers import HTTPRouteHandler
from prometheus_client import CONTENT_TYPE_LATEST

Readiness = Callable[[], str | None]
"""Returns None when ready, else the reason why not."""

Exposition = Callable[[], Awaitable[bytes]]
"""Returns metrics in Prometheus' text format; raises OSError or ValueError when it cannot."""


def health_routes(ready: Readiness, metrics: Exposition) -> list[HTTPRouteHandler]:
    """Make `/health/live`, `/health/ready` and `/metrics`."""

    @get("/health/live", sync_to_thread=False, summary="Is the process alive", tags=["health"])
    def live() -> dict[str, str]:
        return {"status": "live"}

    @get("/health/ready", sync_to_thread=False, summary="May it get traffic", tags=["health"])
    def readiness() -> Response[Any]:
        reason = ready()
        if reason is None:
            return Response({"status": "ready"})
        return Response({"status": "not ready", "reason": reason}, status_code=503)

    @get("/metrics", summary="Prometheus metrics", tags=["health"])
    async def show_metrics() -> Response[bytes]:
        try:
            shown = await metrics()
        except (OSError, ValueError) as error:
            raise ServiceUnavailableException(
                "the workers' metrics cannot be summed up: ask again, or look at the admin ports "
                "that `redmesh get proxies` lists"
            ) from error
        return Response(shown, media_type=CONTENT_TYPE_LATEST)

    return [live, readiness, show_metrics]
