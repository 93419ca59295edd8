"""What the judge of the load tests must see."""

import pytest

from tests.support.verdicts import Outcome, dechunked, judge, told

ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
LAST = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"length"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
ERROR = b'data: {"error":{"message":"replica died","type":"server_error","code":502}}\n\n'
DONE = b"data: [DONE]\n\n"


def test_a_whole_stream_is_good() -> None:
    """A stream with its finish reason, its tokens and its end mark is good."""
    assert judge(200, ROLE + LAST + USAGE + DONE, 4)[0] is Outcome.OK


@pytest.mark.parametrize(
    "body",
    [
        ROLE + LAST + USAGE,
        ROLE + USAGE + DONE,
        ROLE + LAST + DONE,
        DONE,
        b"",
        ROLE + LAST.replace(b"length", b"stop") + USAGE + DONE,
        ROLE + LAST + USAGE.replace(b'tokens":4', b'tokens":3') + DONE,
    ],
)
def test_a_clean_end_is_no_proof_of_success(body: bytes) -> None:
    """A stream that ends cleanly without all that a success has is truncated."""
    assert judge(200, body, 4)[0] is Outcome.TRUNCATED


def test_a_stream_must_end_for_the_reason_that_is_due() -> None:
    """One that must stop is truncated at its limit, and one without a token is never good."""
    stopped = ROLE + LAST.replace(b"length", b"stop") + USAGE + DONE
    assert judge(200, stopped, None, "stop")[0] is Outcome.OK
    assert judge(200, ROLE + LAST + USAGE + DONE, None, "stop")[0] is Outcome.TRUNCATED
    nothing = stopped.replace(b'completion_tokens":4', b'completion_tokens":0')
    assert judge(200, nothing, None, "stop")[0] is Outcome.TRUNCATED


def test_what_is_told_does_not_depend_on_chunks() -> None:
    """Two streams tell the same if texts, log probabilities, stop reason and usage are equal."""
    likely = b'{"token":"%b","logprob":-0.5}'

    def chunk(text: bytes, *tokens: bytes) -> bytes:
        listed = b",".join(likely % token for token in tokens)
        return b'data: {"choices":[{"delta":{"content":"%b"},"logprobs":{"content":[%b]}}]}\n\n' % (
            text,
            listed,
        )

    one = told(ROLE + chunk(b"ab", b"a", b"b") + LAST + USAGE + DONE)
    assert told(ROLE + chunk(b"a", b"a") + chunk(b"b", b"b") + LAST + USAGE + DONE) == one
    assert told(ROLE + chunk(b"ab", b"a") + LAST + USAGE + DONE) != one
    assert told(ROLE + chunk(b"ab", b"a", b"b") + LAST + DONE) != one
    assert one.text == "abx"


@pytest.mark.parametrize("body", [ROLE + ERROR + DONE, ROLE + ERROR, ERROR + DONE])
def test_an_error_event_is_seen(body: bytes) -> None:
    """A stream that ends with an error object is a failure, end mark or not."""
    assert judge(200, body, 4)[0] is Outcome.ERROR_EVENT


@pytest.mark.parametrize(
    "body",
    [
        ROLE + ERROR + LAST + DONE,
        ROLE + b'data: {"error":"bad"}\n\n' + DONE,
        ROLE + b"data: {\n\n" + DONE,
        ROLE + b"oops\n\n" + DONE,
        ROLE + LAST[:-1],
    ],
)
def test_what_is_not_a_stream_of_events_is_malformed(body: bytes) -> None:
    """Anything that a client's parser could stumble over is malformed, errors included."""
    assert judge(200, body, 4)[0] is Outcome.MALFORMED


def test_other_ends_have_their_own_kinds() -> None:
    """A connection that ended early and a status that is not 200 are told apart."""
    assert judge(200, None, 4)[0] is Outcome.RESET
    assert judge(503, b"{}", 4)[0] is Outcome.STATUS


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n", b"abc0123456789"),
        (b"3\r\nabc\r\n0\r\n\r\n3", None),
        (b"3\r\nabc\r\n", None),
        (b"3\r\nab\r\n0\r\n\r\n", None),
        (b"zz\r\nabc\r\n0\r\n\r\n", None),
        (b"", None),
    ],
)
def test_chunks_are_joined_only_if_whole(data: bytes, expected: bytes | None) -> None:
    """A chunked body counts only if every chunk and its end are there, and nothing more."""
    assert dechunked(data) == expected
