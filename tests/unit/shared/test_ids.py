import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import ids
from shared.errors import InvalidInputError


@pytest.mark.parametrize(
    "name", ["gpt2", "llama3:8b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "a", "a" * 128, "u@h+1"]
)
def test_ordinary_names_pass(name: str) -> None:
    """Names as people write them, hub ids included, are valid and come back unchanged."""
    assert ids.check_name("model", name) == name


@pytest.mark.parametrize(
    "name", ["", "a}:{b", "{x}", "a b", "a\n", "-a", "/a", "a" * 129, "ünï", "a\x00", "a*"]
)
def test_names_that_could_move_a_key_are_refused(name: str) -> None:
    """Braces, blanks, control characters and too long names are refused, naming the field."""
    with pytest.raises(InvalidInputError, match="model") as caught:
        ids.check_name("model", name)
    assert caught.value.field == "model"


@given(st.text(max_size=200))
def test_generated_replica_ids_are_valid_names(model: str) -> None:
    """Whatever the model is called, the id made for its replica is a valid name."""
    assert ids.is_name(ids.new_replica_id(model))


def test_generated_ids_do_not_repeat() -> None:
    """A thousand request ids are a thousand different ones."""
    assert len({ids.new_request_id() for _ in range(1000)}) == 1000
