"""The load that a drill drives, and what it takes for granted: a text for each prompt.

Before the fault each prompt is answered once without disturbance; later answers are compared with
that, letter by letter. An engine whose greedy texts depend on what else it computes shows so before
the fault: then texts are not compared, and the report says so.

A client keeps to one proxy. When that goes away before the first byte, the client asks another one;
in mid-stream it does not, for that is what the mesh must survive.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final

import msgspec

from services.cli.drill.answers import Answer
from services.cli.drill.client import Question, Stream
from services.cli.drill.options import LoadWish
from services.cli.drill.records import Outcome, Request
from shared.errors import RedmeshError

PROMPTS: Final = (
    "What is a mesh of language models, and who needs one?",
    "Explain to a child why two machines are better than one.",
    "Tell a short story about a lighthouse and its keeper.",
    "Which steps does a baker take in the morning?",
)
PATIENCE_S: Final = 10.0
"""For how long a client looks for a proxy that begins to answer."""
PAUSE_S: Final = 0.1
RAMP_S: Final = 1.0
"""Users come one by one within this, so that some streams begin while others end."""


class Load:
    """Streams to `urls`; `requests` and `tokens` tell what came of them."""

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        wish: LoadWish,
        clock: Callable[[], float],
        *,
        timeout_s: float,
    ) -> None:
        self._urls = tuple(urls)
        self._wish = wish
        self._clock = clock
        self._timeout_s = timeout_s
        self._questions = [
            Question(model=model, prompt=prompt, tokens=wish.tokens) for prompt in PROMPTS
        ]
        self._stop = asyncio.Event()
        self.compares = False
        """Texts are held against the undisturbed ones."""
        self.requests: list[Request] = []
        """Every request that has ended, in order of ending."""
        self.tokens: Counter[int] = Counter()
        """Second of the run → parts of answers that arrived in it, about one for each token."""
        self.active = 0

    async def rehearse(self) -> None:
        """Ask each prompt once; raise `RedmeshError` when the mesh cannot even do that."""
        answers = [
            await Stream(lambda _: None, self._clock).ask(
                self._urls[number % len(self._urls)], question, self._timeout_s
            )
            for number, question in enumerate(self._questions)
        ]
        for answer in answers:
            if answer.outcome is not Outcome.OK:
                raise RedmeshError(
                    f"the mesh does not answer before the drill: {answer.outcome}, {answer.detail}"
                )
        self._questions = [
            msgspec.structs.replace(question, reference=answer.text)
            for question, answer in zip(self._questions, answers, strict=True)
        ]
        self.compares = True

    def settle(self) -> None:
        """Before the fault: stop comparing if undisturbed texts differ among themselves."""
        if any(request.outcome is Outcome.DIFFERENT for request in self.requests):
            self.compares = False
            self._questions = [
                msgspec.structs.replace(question, reference=None) for question in self._questions
            ]
            self.requests = [
                msgspec.structs.replace(request, outcome=Outcome.OK, detail="")
                if request.outcome is Outcome.DIFFERENT
                else request
                for request in self.requests
            ]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Keep the load up while the block runs; then let what is in flight end."""
        async with asyncio.TaskGroup() as group:
            if self._wish.rate:
                group.create_task(self._arrivals(group))
            else:
                for user in range(self._wish.users):
                    group.create_task(self._user(user))
            try:
                yield
            finally:
                self._stop.set()

    async def _user(self, user: int) -> None:
        await self._pause(RAMP_S * user / self._wish.users)
        number = user
        while not self._stop.is_set():
            outcome = await self._ask(number)
            number += self._wish.users
            # A real client waits a moment after a failure: a dead mesh must not be hammered.
            await self._pause(0.0 if outcome is Outcome.OK else PAUSE_S)

    async def _arrivals(self, group: asyncio.TaskGroup) -> None:
        number = 0
        began_s = self._clock()
        while not self._stop.is_set():
            group.create_task(self._ask(number))
            number += 1
            await self._pause(began_s + number / self._wish.rate - self._clock())

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._stop.wait()

    async def _ask(self, number: int) -> Outcome:
        question = self._questions[number % len(self._questions)]
        began_s = self._clock()
        tries = 0
        self.active += 1
        try:
            while True:
                url = self._urls[(number + tries) % len(self._urls)]
                tries += 1
                stream = Stream(self._heard, self._clock)
                answer = await stream.ask(url, question, self._timeout_s)
                away = answer.outcome in {Outcome.REFUSED, Outcome.RESET}
                patient = self._clock() - began_s < PATIENCE_S
                if not (away and stream.first_s is None and patient):
                    break
                if tries % len(self._urls) == 0:
                    await asyncio.sleep(PAUSE_S)
        finally:
            self.active -= 1
        self.requests.append(self._record(url, stream, answer, began_s, tries))
        return answer.outcome

    def _record(
        self, url: str, stream: Stream, answer: Answer, began_s: float, tries: int
    ) -> Request:
        return Request(
            outcome=answer.outcome,
            began_s=began_s,
            first_s=stream.first_s,
            ended_s=self._clock(),
            proxy=url,
            tries=tries,
            tokens=answer.tokens,
            gap_s=stream.gap_s,
            gap_ended_s=stream.gap_ended_s,
            detail=answer.detail,
        )

    def _heard(self, parts: int) -> None:
        self.tokens[int(self._clock())] += parts
