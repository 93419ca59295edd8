"""Which requests can go on from another replica, and how: pure rules over a request's fields.

Three ways, in the order in which they are wanted:

- *continue*: another replica gets the prompt's and the answer's token ids and generates what comes
  next. Nothing is generated twice. Exact for greedy requests whose options look at no more than
  the tokens they are given; for sampled ones without a seed it is another sample of the same
  distribution.
- *replay*: another replica answers the whole request again, and what was delivered is skipped and
  checked, token by token. Exact for every request whose answer is the same each time: greedy ones
  and those with a seed. It costs the time to generate the delivered part again.
- *refused*, with a reason: there is no way to go on as if nothing had happened.

The options are those of vLLM 0.32's chat and completion requests; what an unknown field does is
unknown, so a request that carries one is replayed or refused, never continued.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Final, NamedTuple, cast

from shared.models.deployment import StreamFailover

MAX_FAILOVERS: Final = 3
"""How often one stream goes on elsewhere before it is given up."""


class Way(Enum):
    """How a stream goes on."""

    CONTINUE = "continue"
    REPLAY = "replay"


class Manner(NamedTuple):
    """How a stream goes on, and what may be expected of it."""

    way: Way
    exact: bool
    """It goes on exactly as it would have; otherwise with another sample."""


class Refused(NamedTuple):
    """A stream that cannot go on, and why, for its client."""

    reason: str


Fields = Mapping[str, object]

CARRIED: Final = frozenset(
    {
        "model",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "length_penalty",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "logit_bias",
        "allowed_token_ids",
        "priority",
        "stream_options",
        "stream_interval",
        "cache_salt",
        "session_id",
        "return_tokens_as_token_ids",
        "logprob_token_ids",
    }
)
"""Options that mean the same for a continuation and are sent along as they are."""

_REWRITTEN: Final = frozenset(
    {
        "stream",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "logprobs",
        "top_logprobs",
        "seed",
        "return_token_ids",
        "frequency_penalty",
        "presence_penalty",
        "n",
        "best_of",
    }
)
"""Options that a continuation has in another form."""

_ABOUT_THE_PROMPT: Final = frozenset(
    {
        "messages",
        "prompt",
        "add_special_tokens",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "chat_template_kwargs",
        "documents",
        "truncate_prompt_tokens",
        "truncation_side",
        "return_prompt_text",
        "return_token_offsets",
        "mm_payload",
        "reasoning_effort",
        "include_reasoning",
        "parallel_tool_calls",
        "request_id",
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
    }
)
"""Options that have done their work once the prompt's token ids are known, or do none."""

_KNOWN: Final = CARRIED | _REWRITTEN | _ABOUT_THE_PROMPT


def manner(fields: Fields, policy: StreamFailover) -> Manner | Refused:
    """Say how the stream of a request with these `fields` may go on under `policy`."""
    if policy is StreamFailover.OFF:
        return Refused("stream failover is off for this model")
    if reason := _hopeless(fields):
        return Refused(reason)
    greedy = fields.get("temperature") == 0
    bound = _bound_to_the_start(fields)
    if greedy or fields.get("seed") is not None:
        penalized = _number(fields, "frequency_penalty") or _number(fields, "presence_penalty")
        # A completion lists likely tokens by their text: those with the same one would be lost.
        listed = _number(fields, "top_logprobs")
        stateless = greedy and not bound and not penalized and not listed
        return Manner(Way.CONTINUE if stateless else Way.REPLAY, exact=True)
    if policy is StreamFailover.EXACT:
        return Refused("it is sampled without a seed, and only exact streams go on for this model")
    if bound:
        return Refused(f"it is sampled without a seed, and `{bound}` cannot begin in the middle")
    return Manner(Way.CONTINUE, exact=False)


def armable(*, choices: object, echo: object, tools: bool, tool_choice: object) -> bool:
    """Tell cheaply whether it makes sense to ask for token ids with a streamed request.

    With `echo`, vLLM drops the echoed text when it is asked for ids; with tools it sends chunks
    that it would not send otherwise: such requests are left as they came.
    """
    return choices in (None, 1) and not echo and (not tools or tool_choice == "none")


def stop_strings(stop: object) -> tuple[str, ...]:
    """List the stop strings that a request's `stop` holds."""
    if isinstance(stop, str):
        return (stop,) if stop else ()
    if isinstance(stop, Sequence):
        return tuple(one for one in cast("Sequence[object]", stop) if isinstance(one, str) and one)
    return ()


def _hopeless(fields: Fields) -> str:
    """Name what makes going on impossible in any way; empty if nothing does."""
    if fields.get("n") not in (None, 1) or fields.get("best_of") not in (None, 1):
        return "it has more than one choice"
    if _several_prompts(fields.get("prompt")):
        return "it has more than one prompt"
    if fields.get("tools") and fields.get("tool_choice") != "none":
        return "its tool calls are parsed from the text as it comes"
    for name in ("echo", "use_beam_search", "suffix", "prompt_embeds"):
        if fields.get(name):
            return f"`{name}` cannot go on elsewhere"
    for name in ("prompt_logprobs", "kv_transfer_params", "ec_transfer_params", "audio"):
        if fields.get(name) is not None:
            return f"`{name}` cannot go on elsewhere"
    return ""


def _bound_to_the_start(fields: Fields) -> str:
    """Name a field whose effect depends on more than the tokens so far; empty if none does."""
    for name, value in fields.items():
        if name in _KNOWN or value is None or value is False or value in ([], {}):
            continue
        if name == "response_format" and isinstance(value, Mapping):
            if cast("Mapping[str, object]", value).get("type") == "text":
                continue
        elif name in {"tools", "tool_choice"}:
            continue
        return name
    return "messages" if _more_than_text(fields.get("messages")) else ""


def _several_prompts(prompt: object) -> bool:
    if not isinstance(prompt, list):
        return False
    parts = cast("list[object]", prompt)
    return len(parts) > 1 and not isinstance(parts[0], int)


def _more_than_text(messages: object) -> bool:
    """Tell whether messages carry images, sound or the like, for which there are no token ids."""
    if not isinstance(messages, list):
        return False
    for message in cast("list[object]", messages):
        content = (
            cast("dict[str, object]", message).get("content") if isinstance(message, dict) else None
        )
        if isinstance(content, list):
            for part in cast("list[object]", content):
                if isinstance(part, dict) and cast("dict[str, object]", part).get("type") != "text":
                    return True
    return False


def _number(fields: Fields, name: str) -> float:
    value = fields.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
