"""Which path is answered by what: routes, the key, and errors in vLLM's shapes."""

import hmac
from collections.abc import Callable

import msgspec
import structlog

from services.simengine import (
    anthropic_api,
    info_api,
    openai_api,
    pooling_api,
    responses_api,
)
from services.simengine.refusals import RefusalError
from services.simengine.serving import Serving
from services.simengine.wire import Exchange

Handler = Callable[[Serving, Exchange], None]

_log = structlog.get_logger(__name__)

_COMMON: dict[tuple[str, str], Handler] = {
    ("GET", "/health"): info_api.health,
    ("GET", "/load"): info_api.load,
    ("GET", "/metrics"): info_api.metrics,
    ("GET", "/ping"): info_api.health,
    ("POST", "/ping"): info_api.health,
    ("GET", "/sim/state"): info_api.state,
    ("GET", "/v1/models"): info_api.models,
    ("GET", "/version"): info_api.version,
    ("POST", "/detokenize"): info_api.detokenize,
    ("POST", "/tokenize"): info_api.tokenize,
}
_GENERATING: dict[tuple[str, str], Handler] = {
    ("POST", "/v1/chat/completions"): openai_api.chat,
    ("POST", "/v1/completions"): openai_api.completions,
    ("POST", "/v1/messages"): anthropic_api.messages,
    ("POST", "/v1/messages/count_tokens"): anthropic_api.count_tokens,
    ("POST", "/v1/responses"): responses_api.responses,
}
_POOLING: dict[tuple[str, str], Handler] = {
    ("POST", "/rerank"): pooling_api.rerank,
    ("POST", "/score"): pooling_api.score,
    ("POST", "/v1/embeddings"): pooling_api.embeddings,
    ("POST", "/v1/rerank"): pooling_api.rerank,
    ("POST", "/v1/score"): pooling_api.score,
    ("POST", "/v2/rerank"): pooling_api.rerank,
}


class Application:
    """Answers exchanges. `api_key`, if any, guards the paths under /v1 (as in vLLM, only those)."""

    def __init__(self, serving: Serving, *, api_key: str | None, allow_faults: bool) -> None:
        self._serving = serving
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._routes = _COMMON | (_POOLING if serving.identity.pooling else _GENERATING)
        if allow_faults:
            self._routes = self._routes | {("POST", "/sim/faults"): info_api.faults}
        self._paths = {path for _, path in self._routes}

    def handle(self, exchange: Exchange) -> None:
        """Answer, now or later; never raises."""
        handler = self._routes.get((exchange.method, exchange.path))
        try:
            if self._key is not None and exchange.path.startswith("/v1"):
                given = exchange.headers.get(b"authorization", b"")
                if not hmac.compare_digest(given, self._key):
                    exchange.reply(401, b'{"error":"Unauthorized"}')
                    return
            if handler is not None:
                handler(self._serving, exchange)
            elif exchange.path in self._paths:
                _detail(exchange, 405, "Method Not Allowed")
            else:
                _detail(exchange, 404, "Not Found")
        except RefusalError as refusal:
            _refuse(exchange, refusal)
        except Exception:  # noqa: BLE001 - one request's bug must neither hang it nor end the rest
            _log.exception("request_failed", path=exchange.path)
            _refuse(exchange, RefusalError(500, "InternalServerError", "Internal server error"))
        finally:
            known = exchange.path if exchange.path in self._paths else "none"
            self._serving.engine.metrics.count_http(known, exchange.method, exchange.status or 200)


def _refuse(exchange: Exchange, refusal: RefusalError) -> None:
    if exchange.path.startswith("/v1/messages"):
        exchange.reply(refusal.status, msgspec.json.encode(refusal.anthropic_error()))
    else:
        exchange.reply(refusal.status, refusal.openai_body())


def _detail(exchange: Exchange, status: int, text: str) -> None:
    exchange.reply(status, msgspec.json.encode({"detail": text}))
