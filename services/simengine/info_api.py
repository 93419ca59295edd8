"""Routes that generate nothing: models, health, metrics, tokenizer, and the simulator's own."""

import msgspec

from services.simengine import requests, text
from services.simengine.faults import FaultOrder, check_fault
from services.simengine.refusals import RefusalError, bad_request, dead, read_body
from services.simengine.serving import VERSION, Serving, chat_ids
from services.simengine.wire import Exchange

_FAULT = msgspec.json.Decoder(FaultOrder)


def models(serving: Serving, exchange: Exchange) -> None:
    """List the served names."""
    identity = serving.identity
    data = [
        {
            "id": name,
            "object": "model",
            "created": identity.created_s,
            "owned_by": "vllm",
            "root": identity.root,
            "parent": None,
            "max_model_len": identity.max_model_len,
            "permission": [
                {
                    "id": f"modelperm-{name}",
                    "object": "model_permission",
                    "created": identity.created_s,
                    "allow_create_engine": False,
                    "allow_sampling": True,
                    "allow_logprobs": True,
                    "allow_search_indices": False,
                    "allow_view": True,
                    "allow_fine_tuning": False,
                    "organization": "*",
                    "group": None,
                    "is_blocking": False,
                }
            ],
        }
        for name in identity.names
    ]
    exchange.reply(200, msgspec.json.encode({"object": "list", "data": data}))


def health(serving: Serving, exchange: Exchange) -> None:
    """Say 200 while the engine core has not died; a frozen one is not noticed here."""
    exchange.reply(503 if serving.engine.is_dead else 200, b"")


def version(_serving: Serving, exchange: Exchange) -> None:
    """Name the release this imitates."""
    exchange.reply(200, msgspec.json.encode({"version": VERSION}))


def load(_serving: Serving, exchange: Exchange) -> None:
    """Say 0, as vLLM does unless load tracking is switched on."""
    exchange.reply(200, b'{"server_load":0}')


def metrics(serving: Serving, exchange: Exchange) -> None:
    """Write the metrics."""
    exchange.reply(
        200,
        serving.engine.metrics.render(),
        content_type=b"text/plain; version=1.0.0; charset=utf-8",
    )


def tokenize(serving: Serving, exchange: Exchange) -> None:
    """Return the ids of a prompt or of messages."""
    content_type = exchange.headers.get(b"content-type", b"")
    request = read_body(exchange.body, content_type, requests.TOKENIZE)
    serving.check_model(request.model)
    if request.messages is not None:
        ids = chat_ids(request.messages)
    elif request.prompt is not None:
        encode = text.encode_prompt if request.add_special_tokens else text.encode
        ids = encode(request.prompt)
    else:
        message = "either `prompt` or `messages` is required"
        raise RefusalError(400, "Bad Request", message, "body.prompt")
    body = {
        "count": len(ids),
        "max_model_len": serving.identity.max_model_len,
        "tokens": ids,
        "token_strs": None,
    }
    exchange.reply(200, msgspec.json.encode(body))


def detokenize(serving: Serving, exchange: Exchange) -> None:
    """Return the text of token ids."""
    content_type = exchange.headers.get(b"content-type", b"")
    request = read_body(exchange.body, content_type, requests.DETOKENIZE)
    serving.check_model(request.model)
    for token in request.tokens:
        if not 0 <= token < text.SIZE:
            raise bad_request(f"Token id {token} is out of vocabulary", "tokens")
    exchange.reply(200, msgspec.json.encode({"prompt": text.decode(request.tokens, special=True)}))


def state(serving: Serving, exchange: Exchange) -> None:
    """Tell what the engine holds right now, past the metrics' gauges."""
    engine = serving.engine
    scheduler = engine.scheduler
    body = {
        "running": scheduler.running,
        "waiting": scheduler.waiting,
        "kv_usage": scheduler.kv_usage,
        "kv_used_blocks": scheduler.pool.used_blocks,
        "kv_capacity_blocks": scheduler.pool.capacity_blocks,
        "preemptions": scheduler.preemptions,
        "in_flight": list(dict.fromkeys(run.sink.name for run in engine.in_flight)),
        "faults": engine.faults,
    }
    exchange.reply(200, msgspec.json.encode(body))


def faults(serving: Serving, exchange: Exchange) -> None:
    """Put a fault in force; only for callers on this machine."""
    if not exchange.loopback:
        raise RefusalError(403, "PermissionDeniedError", "faults are for loopback callers only")
    content_type = exchange.headers.get(b"content-type", b"")
    order = read_body(exchange.body, content_type, _FAULT)
    try:
        check_fault(order, msgspec.json.decode(exchange.body, type=dict[str, object]))
    except msgspec.ValidationError as error:
        raise bad_request(str(error)) from error
    if serving.engine.is_dead:
        raise dead()
    exchange.reply(200, msgspec.json.encode(order))
    serving.engine.inject(order)
