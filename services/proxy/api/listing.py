"""Models and health: ordinary Litestar routes, documented in OpenAPI."""

from typing import Any

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from services.proxy import refusals
from services.proxy.inbound import request_id_of
from services.proxy.refusals import Refusal
from services.proxy.serving import Fleet
from services.proxy.table import ModelTable


def model_routes(fleet: Fleet) -> list[HTTPRouteHandler]:
    """Make the routes that list models."""

    @get("/v1/models", sync_to_thread=False, summary="List the models", tags=["models"])
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(table) for table in fleet.tables.models()]}

    @get("/v1/models/{model:path}", sync_to_thread=False, summary="One model", tags=["models"])
    def get_model(model: FromPath[str]) -> Response[Any]:
        name = model.strip("/")
        table = fleet.tables.resolve(name)
        if table is None:
            known = [known.model for known in fleet.tables.models()]
            return refused(refusals.unknown_model(name, known))
        return Response(_described(table))

    return [list_models, get_model]


def refused(refusal: Refusal, request_id: bytes = b"") -> Response[Any]:
    """Make a Litestar response of a refusal."""
    body = refusal.body()
    headers = {
        name.decode(): value.decode()
        for name, value in refusal.headers(request_id_of(request_id), body)
        if name not in {b"content-type", b"content-length"}
    }
    return Response(
        body, status_code=refusal.status, media_type="application/json", headers=headers
    )


def _described(table: ModelTable) -> dict[str, Any]:
    spec = table.spec
    return {
        "id": table.model,
        "object": "model",
        "created": spec.created_ms // 1000,
        "owned_by": "redmesh",
        "root": table.model,
        "parent": None,
        "aliases": list(spec.aliases),
        "max_model_len": spec.max_model_len_tokens or None,
        "ready_replicas": len(table.ready),
    }
