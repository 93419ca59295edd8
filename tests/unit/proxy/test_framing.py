"""Chunked bodies: found whole however they are cut into reads; nothing else is taken for one."""

import itertools
import random

import pytest

from services.proxy.framing import LAST_CHUNK, MAX_CHUNK_BYTES, MAX_LINE_BYTES, Chunks

Frames = list[tuple[bytes, bytes]]


def chunked(bodies: list[bytes], extension: bytes = b"") -> bytes:
    """Frame bodies, the last chunk included."""
    frames = b"".join(b"%x%b\r\n%b\r\n" % (len(body), extension, body) for body in bodies)
    return frames + LAST_CHUNK


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut data at the given places."""
    edges = [0, *sorted(cuts), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges) if begin < end]


BODIES = [b"data: a\n\n", b"\r\n", b"0\r\n\r\n", b"x" * 300, b"\xc3\xa9"]


@pytest.mark.parametrize("framed", [True, False])
@pytest.mark.parametrize("extension", [b"", b";a=b", b" ; q"])
def test_every_single_cut(framed: bool, extension: bytes) -> None:  # noqa: FBT001 - a table's column
    """However the reads fall, the bodies come out whole and in order, and the end is seen once."""
    data = chunked(BODIES, extension)
    expected = data if framed else b"".join(BODIES)
    for cut in range(1, len(data)):
        chunks = Chunks(framed=framed)
        taken = [chunks.take(piece) for piece in pieces(data, [cut])]
        assert b"".join(taken) == expected
        assert chunks.ended


@pytest.mark.parametrize("seed", range(50))
def test_many_cuts(seed: int) -> None:
    """Any number of cuts gives the same, and what is given with frames always ends a chunk."""
    chance = random.Random(seed)
    bodies = [chance.randbytes(chance.choice([1, 2, 9, 200, 5000])) for _ in range(20)]
    data = chunked(bodies)
    cuts = [chance.randrange(1, len(data)) for _ in range(chance.randrange(40))]
    framed, plain = Chunks(framed=True), Chunks(framed=False)
    given = b""
    for piece in pieces(data, cuts):
        given += framed.take(piece)
        whole = Chunks(framed=False)
        whole.take(given)
        assert whole.take(LAST_CHUNK if not framed.ended else b"") == b""
    assert given == data
    assert b"".join(map(plain.take, pieces(data, cuts))) == b"".join(bodies)
    assert framed.ended
    assert plain.ended


def test_trailers_are_dropped() -> None:
    """Trailers end with the body, and are not passed on."""
    for cut in range(1, 29):
        chunks = Chunks(framed=True)
        data = b"1\r\na\r\n0\r\nx-a: b\r\nc: d\r\n\r\n"
        taken = b"".join(map(chunks.take, pieces(data, [cut] if cut < len(data) else [])))
        assert taken == b"1\r\na\r\n" + LAST_CHUNK
        assert chunks.ended


@pytest.mark.parametrize(
    "data",
    [
        b"zz\r\n",
        b"-1\r\na\r\n",
        b"+1\r\na\r\n",
        b"1_0\r\n",
        b"\r\n",
        b" \r\n",
        b"1\r\nab\r\n",
        b"1\r\na\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n",
        b"1" * (MAX_LINE_BYTES + 1),
        b"%x\r\n" % (MAX_CHUNK_BYTES + 1),
        b"0\r\n" + b"a: b\r\n" * MAX_LINE_BYTES,
    ],
)
def test_what_is_no_chunk(data: bytes) -> None:
    """What is not framed as RFC 9112 says is refused, also when it comes in pieces."""
    with pytest.raises(ValueError, match=r"\w"):
        Chunks(framed=True).take(data)
    chunks = Chunks(framed=False)
    with pytest.raises(ValueError, match=r"\w"):  # noqa: PT012 - some piece must be refused
        for piece in pieces(data, [len(data) // 2]):
            chunks.take(piece)
        chunks.take(b"\r\n\r\n\r\n")
