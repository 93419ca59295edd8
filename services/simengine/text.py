"""A small reversible tokenizer: special tokens, all 256 bytes, letter pairs and words.

Invariant: `decode(encode(text)) == text` for every text, and every id below `size` decodes to
bytes. A character outside ASCII is always several tokens, as it is for rare characters in real
byte-level vocabularies.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product
from string import ascii_lowercase
from typing import Final

from services.simengine.words import ENDINGS, WORDS

BOS: Final = 1
EOS: Final = 2
ROLES: Final = {"system": 3, "user": 4, "assistant": 5, "tool": 6, "developer": 3}
"""Role → the special token that opens a message of that role in the chat template."""

SPECIAL_TEXTS: Final = (
    b"<unk>",
    b"<s>",
    b"</s>",
    b"<|system|>",
    b"<|user|>",
    b"<|assistant|>",
    b"<|tool|>",
)
FIRST_BYTE: Final = len(SPECIAL_TEXTS)
"""Id of the token for byte 0; the byte b is the token FIRST_BYTE + b."""

_PIECE: Final = re.compile(rb" ?[A-Za-z]+| \(|.", re.DOTALL)


def _vocabulary() -> tuple[bytes, ...]:
    texts = dict.fromkeys(bytes([byte]) for byte in range(256))
    texts.update(dict.fromkeys((a + b).encode() for a, b in product(ascii_lowercase, repeat=2)))
    texts.update(dict.fromkeys(f" {word}".encode() for word in WORDS))
    texts.update(dict.fromkeys(ending.encode() for ending in ENDINGS))
    return SPECIAL_TEXTS + tuple(texts)


TOKEN_BYTES: Final = _vocabulary()
"""Token id → its bytes (a special token's bytes are shown only when asked for)."""
SIZE: Final = len(TOKEN_BYTES)
ID_OF: Final = {text: FIRST_BYTE + i for i, text in enumerate(TOKEN_BYTES[FIRST_BYTE:])}
VISIBLE_BYTES: Final = tuple(b"" if i < FIRST_BYTE else text for i, text in enumerate(TOKEN_BYTES))
"""Token id → its bytes with special tokens skipped."""


def encode(text: str) -> list[int]:
    """Return the ids of `text`, without any special token."""
    ids: list[int] = []
    for piece in _PIECE.findall(text.encode("utf-8", "surrogatepass")):
        ids.extend(_piece_ids(piece))
    return ids


def encode_prompt(text: str) -> list[int]:
    """Return the ids of a completion prompt: the start token, then the text."""
    return [BOS, *encode(text)]


def encode_chat(messages: Iterable[tuple[str, str]], *, open_answer: bool = True) -> list[int]:
    """Return the ids of (role, text) pairs in the chat template.

    A message is its role's token, a line feed, its text, the end token and a line feed. With
    `open_answer` the assistant's role token and a line feed follow, where the answer begins.
    """
    line_feed = ID_OF[b"\n"]
    ids = [BOS]
    for role, text in messages:
        ids += [ROLES.get(role, ROLES["user"]), line_feed, *encode(text), EOS, line_feed]
    if open_answer:
        ids += [ROLES["assistant"], line_feed]
    return ids


def decode_bytes(ids: Iterable[int], *, special: bool = False) -> bytes:
    """Return the bytes of `ids`, special tokens only with `special`."""
    table = TOKEN_BYTES if special else VISIBLE_BYTES
    return b"".join([table[i] for i in ids])


def decode(ids: Sequence[int], *, special: bool = False) -> str:
    """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
    return decode_bytes(ids, special=special).decode("utf-8", "replace")


@lru_cache(maxsize=16384)
def _piece_ids(piece: bytes) -> tuple[int, ...]:
    whole = ID_OF.get(piece)
    if whole is not None:
        return (whole,)
    ids: list[int] = []
    at = 0
    while at < len(piece):
        pair = ID_OF.get(piece[at : at + 2])
        if pair is None or at + 1 == len(piece):
            ids.append(ID_OF[piece[at : at + 1]])
            at += 1
        else:
            ids.append(pair)
            at += 2
    return tuple(ids)
