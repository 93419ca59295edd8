"""The routes that are passed on to replicas: an allow-list, and all of it.

Engines have routes without a key check and routes that administrate; none of those is reachable
through the proxy, because only what stands here is ever sent.
"""

from typing import Final, NamedTuple

from services.proxy.refusals import Dialect


class Route(NamedTuple):
    """One route of the proxy and the engine's route that answers it."""

    path: str
    summary: str
    upstream: bytes
    dialect: Dialect = Dialect.OPENAI


ROUTES: Final = (
    Route("/v1/chat/completions", "Chat, streamed or not", b"/v1/chat/completions"),
    Route("/v1/completions", "Text completion, streamed or not", b"/v1/completions"),
    Route("/v1/embeddings", "Embeddings", b"/v1/embeddings"),
    Route("/v1/responses", "OpenAI's responses", b"/v1/responses"),
    Route("/v1/messages", "Anthropic's messages", b"/v1/messages", Dialect.ANTHROPIC),
    Route(
        "/v1/messages/count_tokens",
        "Count the tokens of Anthropic's messages",
        b"/v1/messages/count_tokens",
        Dialect.ANTHROPIC,
    ),
    Route("/v1/rerank", "Rank documents by a query", b"/v1/rerank"),
    Route("/v1/score", "Score pairs of texts", b"/v1/score"),
    Route("/tokenize", "Tokenize a prompt", b"/tokenize"),
    Route("/detokenize", "Turn token ids into text", b"/detokenize"),
)

CHAT: Final = ROUTES[0]
ADDRESSED: Final = "/v1/chat/"
"""`/v1/chat/{model}`: chat with the model that the path names."""
