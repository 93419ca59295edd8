"""Chat and completions over HTTP: shapes, usage, token ids, continuation, hold-back, abort."""

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest

from services.simengine import text
from tests.support.waiting import wait_until
from tests.unit.simengine.driving import Started

Start = Callable[..., Awaitable[Started]]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "Tell me about streams"}]
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


async def test_a_chat_answer_has_every_part(start: Start) -> None:
    """The whole answer carries id, first served name, message, finish reason and usage."""
    engine = await start()
    body = await engine.ok(CHAT, model="alias", messages=MESSAGES, max_tokens=5, **GREEDY)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "tiny"
    choice = body["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    assert choice["token_ids"] is None
    assert body["usage"]["completion_tokens"] == 5
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 5


async def test_a_chat_stream_begins_with_the_role_and_says_what_the_whole_answer_says(
    start: Start,
) -> None:
    """Role chunk, one chunk per token, finish reason in the last, usage when asked, [DONE]."""
    engine = await start()
    ask: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 40, **GREEDY}
    whole = await engine.ok(CHAT, **ask)
    stream = await engine.stream(
        CHAT, return_token_ids=True, stream_options={"include_usage": True}, **ask
    )
    assert stream.done
    assert stream.choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert stream.chunks[0]["prompt_token_ids"] == text.encode_chat(
        [("user", "Tell me about streams")]
    )
    assert stream.text == whole["choices"][0]["message"]["content"]
    assert len(stream.ids) == 40
    assert stream.finish == ("length", None)
    assert [choice["finish_reason"] for choice in stream.choices[:-1]] == [None] * 40
    assert stream.chunks[-1]["choices"] == []
    told = {name: count for name, count in whole["usage"].items() if count is not None}
    assert stream.chunks[-1]["usage"] == told
    assert {chunk["id"] for chunk in stream.chunks} == {stream.chunks[0]["id"]}


async def test_a_completion_stream_carries_the_prompts_ids_in_its_first_choice(
    start: Start,
) -> None:
    """prompt_token_ids stand inside choices[0] of the first chunk only."""
    engine = await start()
    stream = await engine.stream(
        COMPLETIONS, prompt=[5, 6, 7], max_tokens=4, return_token_ids=True, **GREEDY
    )
    assert [choice["prompt_token_ids"] for choice in stream.choices] == [
        [5, 6, 7],
        None,
        None,
        None,
    ]
    assert all(len(choice["token_ids"]) == 1 for choice in stream.choices)
    assert all(chunk["object"] == "text_completion" for chunk in stream.chunks)


async def test_ids_are_null_unless_asked_for(start: Start) -> None:
    """Without return_token_ids the keys are there and null."""
    engine = await start()
    stream = await engine.stream(COMPLETIONS, prompt="a", max_tokens=2, **GREEDY)
    assert [choice["token_ids"] for choice in stream.choices] == [None, None]


async def test_a_chat_goes_on_exactly_as_a_completion_of_its_ids(start: Start) -> None:
    """At every cut, prompt ids + generated ids on another engine give the same rest."""
    first, second = await start(), await start()
    stream = await first.stream(
        CHAT, messages=MESSAGES, max_tokens=48, return_token_ids=True, **GREEDY
    )
    prompt = stream.chunks[0]["prompt_token_ids"]
    shown = 0
    for cut, choice in enumerate(stream.choices[1:], start=1):
        delta = choice["delta"]["content"]
        shown += len(delta)
        if not delta or cut == 48:
            continue  # only a cut after visible text is safe
        rest = await second.ok(
            COMPLETIONS, prompt=prompt + stream.ids[:cut], max_tokens=48 - cut, **GREEDY
        )
        assert rest["choices"][0]["text"] == stream.text[shown:]


async def test_a_natural_end_is_a_stop(start: Start) -> None:
    """An answer that ends by itself says stop, without a reason, and shows no end token."""
    engine = await start("--mean-answer-tokens", "16")
    stream = await engine.stream(
        COMPLETIONS, prompt="a", max_tokens=2000, temperature=0, return_token_ids=True
    )
    assert stream.finish == ("stop", None)
    assert stream.ids[-1] == text.EOS
    assert "</s>" not in stream.text


async def test_min_tokens_keeps_an_answer_going(start: Start) -> None:
    """No end comes before min_tokens."""
    engine = await start("--mean-answer-tokens", "16")
    ask: dict[str, Any] = {"prompt": "a", "max_tokens": 2000, "temperature": 0}
    short = await engine.ok(COMPLETIONS, **ask)
    least = short["usage"]["completion_tokens"] + 30
    longer = await engine.ok(COMPLETIONS, min_tokens=least, **ask)
    assert longer["usage"]["completion_tokens"] > least


async def test_a_stop_string_ends_the_answer_before_it(start: Start) -> None:
    """Streamed and whole alike: the text ends before the stop string, which is the reason."""
    engine = await start()
    ask: dict[str, Any] = {"prompt": "a", "max_tokens": 60, **GREEDY}
    plain = (await engine.ok(COMPLETIONS, **ask))["choices"][0]["text"]
    stop = plain[40:52]
    before = plain[: plain.index(stop)]
    whole = await engine.ok(COMPLETIONS, stop=[stop], **ask)
    stream = await engine.stream(COMPLETIONS, stop=stop, **ask)
    assert whole["choices"][0]["text"] == stream.text == before
    assert whole["choices"][0]["stop_reason"] == stop
    assert stream.finish == ("stop", stop)


async def test_a_stop_token_is_the_reason_and_is_not_shown(start: Start) -> None:
    """stop_token_ids end the answer at that id."""
    engine = await start()
    ask: dict[str, Any] = {"prompt": "a", "max_tokens": 30, "return_token_ids": True, **GREEDY}
    plain = await engine.stream(COMPLETIONS, **ask)
    token = plain.ids[10]
    stream = await engine.stream(COMPLETIONS, stop_token_ids=[token], **ask)
    assert stream.finish == ("stop", token)
    assert stream.ids == plain.ids[: plain.ids.index(token) + 1]


async def test_choices_are_numbered_and_differ(start: Start) -> None:
    """Sampled choices of two prompts come as indexes 0 to 3; usage counts each prompt once."""
    engine = await start()
    ask: dict[str, Any] = {"prompt": ["a", "b c"], "n": 2, "max_tokens": 20, "ignore_eos": True}
    body = await engine.ok(COMPLETIONS, **ask)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["choices"][0]["text"] != body["choices"][1]["text"]
    prompt_tokens = len(text.encode_prompt("a")) + len(text.encode_prompt("b c"))
    assert body["usage"]["prompt_tokens"] == prompt_tokens
    assert body["usage"]["completion_tokens"] == 80
    stream = await engine.stream(COMPLETIONS, **ask)
    assert {choice["index"] for choice in stream.choices} == {0, 1, 2, 3}


async def test_a_seed_repeats_on_another_engine(start: Start) -> None:
    """The same seed and temperature give the same text anywhere."""
    first, second = await start(), await start()
    ask: dict[str, Any] = {"prompt": "a", "seed": 3, "temperature": 0.8, "max_tokens": 20}
    one, two = await first.ok(COMPLETIONS, **ask), await second.ok(COMPLETIONS, **ask)
    assert one["choices"][0]["text"] == two["choices"][0]["text"]


async def test_echo_begins_with_the_prompt_unless_ids_are_asked_for(start: Start) -> None:
    """Asking for token ids silently drops the echo, as the real engine does."""
    engine = await start()
    ask: dict[str, Any] = {"prompt": "hello there", "echo": True, "max_tokens": 3, **GREEDY}
    body = await engine.ok(COMPLETIONS, **ask)
    assert body["choices"][0]["text"].startswith("hello there")
    body = await engine.ok(COMPLETIONS, return_token_ids=True, **ask)
    assert not body["choices"][0]["text"].startswith("hello there")


async def test_logprobs_have_both_shapes(start: Start) -> None:
    """Chat lists content entries; completions list parallel arrays."""
    engine = await start()
    body = await engine.ok(
        CHAT, messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, **GREEDY
    )
    content = body["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2, 2]
    body = await engine.ok(COMPLETIONS, prompt="a", max_tokens=3, logprobs=2, **GREEDY)
    logprobs = body["choices"][0]["logprobs"]
    assert {len(values) for values in logprobs.values()} == {3}


async def test_the_clients_request_id_is_in_the_answers_id(start: Start) -> None:
    """X-Request-Id, or request_id in the body, ends the id."""
    engine = await start()
    response = await engine.client.post(
        COMPLETIONS, json={"prompt": "a", "max_tokens": 1}, headers={"x-request-id": "r-1"}
    )
    assert response.json()["id"] == "cmpl-r-1"
    body = await engine.ok(CHAT, messages=MESSAGES, max_tokens=1, request_id="r-2")
    assert body["id"] == "chatcmpl-r-2"


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_aborts_its_request(start: Start, *, streamed: bool) -> None:
    """Closing the socket frees the sequence and its KV blocks, streamed or not."""
    engine = await start()
    scheduler = engine.simulator.engine.scheduler
    body = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": streamed}
    async with httpx.AsyncClient(base_url=engine.client.base_url) as leaving:
        if streamed:
            async with leaving.stream("POST", COMPLETIONS, json=body) as response:
                await anext(response.aiter_lines())
                assert scheduler.running == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                await leaving.post(COMPLETIONS, json=body, timeout=0.2)
    await wait_until(lambda: scheduler.running == 0, what="the run is dropped")
    assert scheduler.pool.used_blocks == 0
    assert engine.simulator.engine.in_flight == []


async def test_the_official_client_works(start: Start) -> None:
    """The openai client streams a chat and lists models, key included."""
    engine = await start(key="secret")
    base_url = f"{engine.client.base_url}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="secret") as client:
        assert [model.id async for model in client.models.list()] == ["tiny", "alias"]
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=5,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices[0].finish_reason == "length"
