"""Which token comes next: a hash chain over the whole id sequence.

Greedy, the next token is a pure function of all ids so far (prompt and generated), so a second
replica that is given prompt ids + generated ids goes on token for token. A seeded run depends
on the seed and on the position counted from the start of the *run*: the same on every replica
from its start, but its continuation is not its tail, as in the real engine. A run with a
temperature and no seed differs each time.
"""

from array import array
from collections.abc import Sequence
from random import Random
from typing import Final
from zlib import crc32

from services.simengine.text import EOS, FIRST_BYTE, ID_OF, SIZE, TOKEN_BYTES
from services.simengine.words import CHARACTERS, ENDINGS, WORDS

_MASK: Final = (1 << 64) - 1
_ODD: Final = 0x9E3779B97F4A7C15
_FULL_STOP: Final = ID_OF[b"."]
_STOP_EVERY_TOKENS: Final = 16
_TABLE_SIZE: Final = 4096
_ID_BYTES: Final = tuple(i.to_bytes(4, "little") for i in range(SIZE))


def _next_bytes() -> dict[bytes, tuple[int, ...]]:
    """Map the first bytes of a character to the ids that may follow them."""
    table: dict[bytes, list[int]] = {}
    for character in CHARACTERS:
        raw = character.encode()
        for cut in range(1, len(raw)):
            ids = table.setdefault(raw[:cut], [])
            if FIRST_BYTE + raw[cut] not in ids:
                ids.append(FIRST_BYTE + raw[cut])
    return {prefix: tuple(ids) for prefix, ids in table.items()}


def _mixture() -> tuple[int, ...]:
    """Return what is said where nothing is begun: words, some punctuation, some characters."""
    stops = [_FULL_STOP] * (_TABLE_SIZE // _STOP_EVERY_TOKENS)
    leads = [FIRST_BYTE + character.encode()[0] for character in CHARACTERS] * 4
    other = [ID_OF[ending.encode()] for ending in ENDINGS if ending != "."] * 24
    rest = _TABLE_SIZE - len(stops) - len(leads) - len(other)
    words = [ID_OF[f" {word}".encode()] for word in WORDS]
    return tuple(stops + leads + other + [words[i % len(words)] for i in range(rest)])


_NEXT_BYTE: Final = _next_bytes()
_MIXTURE: Final = _mixture()


class Chooser:
    """Chooses the tokens of one run after `prompt_ids`.

    `seed` None and `noise` None is greedy; `noise` gives a run without a seed its chance.
    `mean_answer_tokens` sets how soon an answer ends by itself; 0 is never.
    """

    __slots__ = ("_end_odds", "_last", "_noise", "_open", "_position", "_seed", "_state")

    def __init__(
        self,
        prompt_ids: Sequence[int],
        *,
        mean_answer_tokens: int,
        seed: int | None = None,
        noise: Random | None = None,
    ) -> None:
        self._state = crc32(array("I", prompt_ids).tobytes())
        self._last = prompt_ids[-1] if prompt_ids else EOS
        self._open = _open_character(prompt_ids)
        self._seed = None if seed is None else (seed * _ODD) & _MASK
        self._noise = noise
        self._position = 0
        self._end_odds = (
            max(1, mean_answer_tokens // _STOP_EVERY_TOKENS) if mean_answer_tokens else 0
        )

    def next_id(self, *, may_end: bool) -> int:
        """Choose and append one token; the end token only if `may_end`."""
        number = (self._state * _ODD) & _MASK
        number ^= number >> 29
        if self._seed is not None:
            self._position += 1
            number ^= ((self._seed + self._position) * _ODD) & _MASK
            number = ((number ^ (number >> 31)) * _ODD) & _MASK
        elif self._noise is not None:
            number ^= self._noise.getrandbits(64)
        options = _NEXT_BYTE.get(self._open) if self._open else None
        if options is not None:
            token = options[(number >> 20) % len(options)]
            begun = self._open + TOKEN_BYTES[token]
            self._open = begun if begun in _NEXT_BYTE else b""
        elif (
            may_end
            and self._end_odds
            and self._last == _FULL_STOP
            and (number >> 40) % self._end_odds == 0
        ):
            token = EOS
            self._open = b""
        else:
            token = _MIXTURE[(number >> 20) % _TABLE_SIZE]
            text = TOKEN_BYTES[token]
            self._open = text if text in _NEXT_BYTE else b""
        self._last = token
        self._state = crc32(_ID_BYTES[token], self._state)
        return token


def _open_character(ids: Sequence[int]) -> bytes:
    """Return the bytes of the character that `ids` end inside of, or nothing."""
    tail = b"".join(TOKEN_BYTES[i] for i in ids[-3:] if i >= FIRST_BYTE)
    for start in range(len(tail) - 1, max(-1, len(tail) - 4), -1):
        if tail[start] >= 0xC0:
            return tail[start:] if tail[start:] in _NEXT_BYTE else b""
    return b""
