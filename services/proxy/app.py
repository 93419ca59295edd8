"""The Litestar application: documented routes for people, ASGI routes for the data plane."""

from typing import Any

import structlog
from litestar import Litestar, Request, Response, asgi
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.spec import OpenAPIResponse, Operation, PathItem, Reference

from services.proxy import refusals
from services.proxy.api.health import Exposition, Readiness, health_routes
from services.proxy.api.hot import HotRoutes
from services.proxy.api.listing import model_routes, refused
from services.proxy.paths import ADDRESSED, ROUTES
from services.proxy.resume.api import PATH, StreamRoutes
from services.proxy.serving import Fleet

_log = structlog.get_logger(__name__)


def build_app(
    fleet: Fleet,
    hot: HotRoutes,
    streams: StreamRoutes,
    *,
    version: str,
    ready: Readiness,
    metrics: Exposition,
) -> Litestar:
    """Build the application around `fleet`, its hot routes and its resumable streams."""
    app = Litestar(
        route_handlers=[
            *(asgi(route.path, copy_scope=False)(hot.handler(route)) for route in ROUTES),
            asgi(ADDRESSED.rstrip("/"), is_mount=True, copy_scope=False)(hot.addressed_handler()),
            asgi(PATH.rstrip("/"), is_mount=True, copy_scope=False)(streams.handle),
            *model_routes(fleet),
            *health_routes(ready, metrics),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _fault},
        openapi_config=OpenAPIConfig(title="redmesh", version=version),
        logging_config=None,
    )
    _document(app)
    return app


def _document(app: Litestar) -> None:
    """Add the ASGI routes to the OpenAPI document, which Litestar leaves out."""
    paths = app.openapi_schema.paths
    if paths is None:
        return
    answers: dict[str, OpenAPIResponse | Reference] = {
        "200": OpenAPIResponse(description="The engine's answer, JSON or server-sent events")
    }
    for route in ROUTES:
        operation = Operation(summary=route.summary, tags=["engine"], responses=answers)
        paths[route.path] = PathItem(post=operation)
    paths[ADDRESSED + "{model}"] = PathItem(
        post=Operation(
            summary="Chat with the model in the path: a JSON chat request, or a text/plain prompt",
            tags=["engine"],
            responses=answers,
        )
    )
    paths[PATH + "{id}"] = PathItem(
        get=Operation(
            summary="Resume a stream that was begun with X-Redmesh-Resumable: 1, after the event "
            "that Last-Event-ID names",
            tags=["streams"],
            responses={"200": OpenAPIResponse(description="The events after that one")},
        ),
        delete=Operation(
            summary="Cancel a resumable stream",
            tags=["streams"],
            responses={"204": OpenAPIResponse(description="It is cancelled")},
        ),
    )


def _http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    given = request.headers.get("x-request-id", "").encode("latin-1", "replace")
    if error.status_code == 404:
        refusal = refusals.unknown_route(request.scope["path"])
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("allow", "GET")
        refusal = refusals.wrong_method(request.scope["method"], allowed)
    else:
        refusal = refusals.Refusal(status=error.status_code, message=error.detail)
    return refused(refusal, given)


def _fault(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    _log.error("request_failed", path=request.scope["path"], exc_info=error)
    return refused(refusals.internal())
