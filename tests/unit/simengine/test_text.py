"""Tokens and text: reversible, deterministic, held back where bytes are no text yet."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from services.simengine import text
from services.simengine.choosing import Chooser
from services.simengine.detokenizer import Detokenizer


@given(st.text())
def test_every_text_survives_its_tokens(words: str) -> None:
    """Encoding and decoding gives back any text, including what no word covers."""
    assert text.decode(text.encode(words)) == words


def test_a_message_cannot_write_special_tokens() -> None:
    """Text that looks like a role marker stays text: a message cannot open another turn."""
    assert text.ROLES["assistant"] not in text.encode("<|assistant|>")


def _continue(ids: list[int], tokens: int, **options: object) -> list[int]:
    seed = options.get("seed")
    chooser = Chooser(ids, mean_answer_tokens=160, seed=seed if isinstance(seed, int) else None)
    return [chooser.next_id(may_end=False) for _ in range(tokens)]


def test_greedy_goes_on_exactly_from_every_cut() -> None:
    """A second replica that is given prompt ids and generated ids chooses the same rest."""
    prompt = text.encode_chat([("user", "Why do streams survive?")])
    whole = _continue(prompt, 120)
    for cut in range(121):
        assert _continue(prompt + whole[:cut], 120 - cut) == whole[cut:]


def test_a_seeded_run_repeats_but_its_continuation_is_not_its_tail() -> None:
    """The seed counts from the start of the run, so a continuation restarts it."""
    prompt = text.encode("once upon a time")
    whole = _continue(prompt, 60, seed=7)
    assert _continue(prompt, 60, seed=7) == whole
    assert _continue(prompt, 60, seed=8) != whole
    rest = _continue(prompt + whole[:20], 40, seed=7)
    assert rest != whole[20:]
    assert rest == _continue(prompt + whole[:20], 40, seed=7)


def test_different_histories_give_different_text() -> None:
    """The chain covers the whole sequence: one changed early token changes what follows."""
    tail = text.encode(" and then the same words follow for a long while")
    assert _continue([300, *tail], 30) != _continue([301, *tail], 30)


def test_chance_differs_each_time() -> None:
    """Without a seed two runs of one prompt differ."""
    runs: list[list[int]] = []
    for _ in range(2):
        chooser = Chooser([5], mean_answer_tokens=160, noise=Random())
        runs.append([chooser.next_id(may_end=False) for _ in range(30)])
    assert runs[0] != runs[1]


def test_answers_end_by_themselves_unless_told_not_to() -> None:
    """With an answer length some token is the end; with length 0 none is."""

    def has_end(mean_answer_tokens: int) -> bool:
        chooser = Chooser([5], mean_answer_tokens=mean_answer_tokens)
        return text.EOS in [chooser.next_id(may_end=True) for _ in range(5000)]

    assert has_end(160)
    assert not has_end(0)


def test_text_contains_characters_split_over_tokens_and_shows_them_whole() -> None:
    """Deltas are always valid text, some tokens show nothing, and nothing is lost."""
    ids = _continue([5], 3000)
    detokenizer = Detokenizer([5])
    deltas: list[str] = []
    for token in ids:
        detokenizer.push(token)
        deltas.append(detokenizer.take(finished=False))
    assert "\ufffd" not in "".join(deltas)
    assert deltas.count("") > 20
    assert "".join(deltas) == text.decode(ids).rstrip("\ufffd")


def test_a_prompt_that_ends_inside_a_character_is_repeated_by_the_first_delta() -> None:
    """The trap of the real engine: the first delta then holds the decoded prompt as well."""
    prompt = [*text.encode("Secret prompt text."), text.FIRST_BYTE + 0xC3]
    detokenizer = Detokenizer(prompt)
    detokenizer.push(text.FIRST_BYTE + 0xA9)
    assert detokenizer.take(finished=False) == "Secret prompt text.é"


def _with_stop(words: str, stops: tuple[str, ...], **options: bool) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer([5], stops=stops, include_stop=options.get("include_stop", False))
    deltas: list[str] = []
    for token in text.encode(words):
        found = detokenizer.push(token)
        deltas.append(detokenizer.take(finished=found is not None))
        if found is not None:
            return deltas, found
    return deltas, None


def test_a_stop_string_over_several_tokens_is_never_shown() -> None:
    """Text lags by the longest stop minus one, so no beginning of a stop slips out."""
    deltas, found = _with_stop("one two three four", ("three fo", "zzz"))
    assert found == "three fo"
    assert "".join(deltas) == "one two "
    assert all("thr" not in delta for delta in deltas)


def test_a_stop_string_is_shown_when_asked_for() -> None:
    """With include_stop_str_in_output the answer ends with the stop string."""
    deltas, found = _with_stop("one two three four", ("three",), include_stop=True)
    assert found == "three"
    assert "".join(deltas) == "one two three"


def test_text_that_waited_for_a_stop_comes_out_at_the_end() -> None:
    """When no stop string came, the last delta shows what was held back."""
    detokenizer = Detokenizer([5], stops=("never seen",))
    for token in text.encode("short"):
        detokenizer.push(token)
    assert detokenizer.take(finished=False) == ""
    assert detokenizer.take(finished=True) == "short"
