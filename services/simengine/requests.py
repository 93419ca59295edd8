"""Request bodies, as far as they matter here. Unknown fields are ignored, as vLLM ignores them."""

from typing import Final

import msgspec

Stop = str | list[str] | None
Prompt = str | list[str | int | list[int]]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message; only text is understood."""

    type: str = "text"
    text: str | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that all generating OpenAI routes share."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int | None = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Stop = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    request_id: str | None = None


class ChatRequest(Sampling, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    tools: list[dict[str, object]] | None = None
    tool_choice: str | dict[str, object] | None = None
    add_generation_prompt: bool = True


class CompletionRequest(Sampling, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = 16
    """An explicit null asks for all that the context has room for."""
    logprobs: int | None = None
    echo: bool | None = False
    add_special_tokens: bool = True


class InputItem(msgspec.Struct, frozen=True, kw_only=True):
    """One item of a Responses input."""

    role: str = "user"
    content: str | list[ContentPart] | None = None


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/responses."""

    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False
    request_id: str | None = None


class AnthropicRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/messages and, without `max_tokens`, /v1/messages/count_tokens."""

    messages: list[Message]
    model: str | None = None
    system: str | list[ContentPart] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop_sequences: list[str] | None = None
    stream: bool = False


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/embeddings."""

    input: Prompt
    model: str | None = None
    encoding_format: str = "float"
    dimensions: int | None = None


class RerankRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/rerank and its aliases."""

    query: str
    documents: list[str]
    model: str | None = None
    top_n: int = 0


class ScoreRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/score and its alias."""

    text_1: str | list[str]
    text_2: str | list[str]
    model: str | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: a prompt or messages."""

    prompt: str | None = None
    messages: list[Message] | None = None
    model: str | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


CHAT: Final = msgspec.json.Decoder(ChatRequest)
COMPLETION: Final = msgspec.json.Decoder(CompletionRequest)
RESPONSES: Final = msgspec.json.Decoder(ResponsesRequest)
ANTHROPIC: Final = msgspec.json.Decoder(AnthropicRequest)
EMBEDDING: Final = msgspec.json.Decoder(EmbeddingRequest)
RERANK: Final = msgspec.json.Decoder(RerankRequest)
SCORE: Final = msgspec.json.Decoder(ScoreRequest)
TOKENIZE: Final = msgspec.json.Decoder(TokenizeRequest)
DETOKENIZE: Final = msgspec.json.Decoder(DetokenizeRequest)


def text_of(content: str | list[ContentPart] | None) -> str:
    """Return the text of a message's content; parts without text count as nothing."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content if part.text is not None)
