"""Which requests go on elsewhere, and how: the rules, as a table."""

from typing import Any

import pytest

from services.proxy.continuation.rules import Manner, Refused, Way, armable, manner, stop_strings
from shared.models.deployment import StreamFailover

EXACT_CONTINUE = Manner(Way.CONTINUE, exact=True)
EXACT_REPLAY = Manner(Way.REPLAY, exact=True)
VALID = Manner(Way.CONTINUE, exact=False)
GREEDY: dict[str, Any] = {"model": "m", "temperature": 0}
TOOL: dict[str, Any] = {"type": "function"}
TEXT = [{"role": "user", "content": "hi"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({**GREEDY}, EXACT_CONTINUE),
        ({**GREEDY, "temperature": 0.0, "seed": 3}, EXACT_CONTINUE),
        ({**GREEDY, "stop": "x", "logit_bias": {"1": 2}, "min_tokens": 3}, EXACT_CONTINUE),
        ({**GREEDY, "repetition_penalty": 1.3, "ignore_eos": True}, EXACT_CONTINUE),
        ({**GREEDY, "messages": TEXT, "logprobs": True}, EXACT_CONTINUE),
        ({**GREEDY, "logprobs": True, "top_logprobs": 2}, EXACT_REPLAY),
        ({**GREEDY, "frequency_penalty": 0.1}, EXACT_REPLAY),
        ({**GREEDY, "presence_penalty": -0.1}, EXACT_REPLAY),
        ({**GREEDY, "bad_words": ["no"]}, EXACT_REPLAY),
        ({**GREEDY, "response_format": {"type": "json_object"}}, EXACT_REPLAY),
        ({**GREEDY, "response_format": {"type": "text"}}, EXACT_CONTINUE),
        ({**GREEDY, "structured_outputs": {"regex": "a+"}}, EXACT_REPLAY),
        ({**GREEDY, "messages": IMAGE}, EXACT_REPLAY),
        ({**GREEDY, "some_new_field": 1}, EXACT_REPLAY),
        ({**GREEDY, "some_new_field": None}, EXACT_CONTINUE),
        ({**GREEDY, "tools": [], "tool_choice": "auto"}, EXACT_CONTINUE),
        ({**GREEDY, "tools": [TOOL], "tool_choice": "none"}, EXACT_CONTINUE),
        ({"seed": 0}, EXACT_REPLAY),
        ({"seed": 7, "temperature": 1.0}, EXACT_REPLAY),
        ({"top_k": 1}, VALID),
        ({"temperature": 0.7}, VALID),
        ({}, VALID),
        ({"frequency_penalty": 0.5}, VALID),
        ({**GREEDY, "prompt": [1, 2, 3]}, EXACT_CONTINUE),
        ({**GREEDY, "prompt": ["one"]}, EXACT_CONTINUE),
    ],
)
def test_streams_that_go_on(fields: dict[str, Any], expected: Manner) -> None:
    """Greedy and seeded streams go on exactly, the others with another sample."""
    assert manner(fields, StreamFailover.VALID) == expected
    exact_only = manner(fields, StreamFailover.EXACT)
    assert exact_only == expected if expected.exact else isinstance(exact_only, Refused)
    assert isinstance(manner(fields, StreamFailover.OFF), Refused)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({**GREEDY, "n": 2}, "choice"),
        ({**GREEDY, "best_of": 2}, "choice"),
        ({**GREEDY, "prompt": ["one", "two"]}, "prompt"),
        ({**GREEDY, "prompt": [[1], [2]]}, "prompt"),
        ({**GREEDY, "tools": [{"type": "function"}]}, "tool"),
        ({**GREEDY, "tools": [TOOL], "tool_choice": "required"}, "tool"),
        ({**GREEDY, "echo": True}, "echo"),
        ({**GREEDY, "use_beam_search": True}, "use_beam_search"),
        ({**GREEDY, "suffix": "end"}, "suffix"),
        ({**GREEDY, "prompt_logprobs": 0}, "prompt_logprobs"),
        ({**GREEDY, "prompt_embeds": "AA"}, "prompt_embeds"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"bad_words": ["no"]}, "bad_words"),
        ({"messages": IMAGE}, "messages"),
        ({"some_new_field": 1}, "some_new_field"),
    ],
)
def test_streams_that_do_not(fields: dict[str, Any], named: str) -> None:
    """What cannot go on is refused, and the reason names what stands in the way."""
    refused = manner(fields, StreamFailover.VALID)
    assert isinstance(refused, Refused)
    assert named in refused.reason


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, True),
        ({"choices": 1}, True),
        ({"choices": 2}, False),
        ({"echo": True}, False),
        ({"tools": True}, False),
        ({"tools": True, "tool_choice": "none"}, True),
    ],
)
def test_what_is_asked_for_ids(asked: dict[str, Any], wanted: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """Token ids are not asked for where that would change the answer."""
    nothing: dict[str, Any] = {"choices": None, "echo": None, "tools": False, "tool_choice": None}
    assert armable(**{**nothing, **asked}) is wanted


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (None, ()),
        ("", ()),
        ("a", ("a",)),
        (["a", "bc", ""], ("a", "bc")),
        ([1, "a"], ("a",)),
        (7, ()),
    ],
)
def test_stop_strings(stop: object, expected: tuple[str, ...]) -> None:
    """A stop is one string or a list; anything else is the engine's to refuse."""
    assert stop_strings(stop) == expected
