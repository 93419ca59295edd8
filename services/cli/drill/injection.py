"""What an injector gives: one fault that is ready to strike, and how it ends.

All that can be refused is refused before: whoever holds an injection can strike.
"""

from collections.abc import Awaitable, Callable

from services.cli.drill.catalogue import Drill
from services.cli.drill.records import Struck
from shared.errors import InvalidInputError

Act = Callable[[], Awaitable[None]]


class Injection:
    """One fault, made ready."""

    def __init__(
        self,
        told: str,
        struck: Struck,
        strike: Act,
        *,
        heal: Act | None = None,
        restore: Act | None = None,
    ) -> None:
        self.told = told
        """What exactly is struck, in a sentence."""
        self.struck = struck
        self.seen = ""
        """What the injector itself saw of the fault when it struck, in words."""
        self.lasts = heal is not None
        """The fault lasts until `heal`."""
        self._strike = strike
        self._heal = heal
        self._restore = restore

    async def strike(self) -> None:
        """Bring the fault about; returns when it is in force."""
        await self._strike()

    async def heal(self) -> None:
        """End a fault that lasts; at most once."""
        act, self._heal = self._heal, None
        if act is not None:
            await act()

    async def restore(self) -> None:
        """Leave the mesh as it was found; ends the fault too, if nobody did."""
        await self.heal()
        act, self._restore = self._restore, None
        if act is not None:
            await act()


def cannot(drill: Drill, why: str) -> InvalidInputError:
    """Say that a drill cannot be done on this deployment, and what is missing."""
    return InvalidInputError(f"{drill.name} cannot be done on this mesh: {why}")
