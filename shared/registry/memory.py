"""A memory of what is declared, and the way back into a Redis that has lost it.

Every controller and every agent keeps one. After data were lost, the first of them that reads the
registry declares again what is missing; the others find it done. What is later than a memory, and
what does not parse, is never touched: see `shared.models.catalogue` for the rules.
"""

import structlog

from shared.models.catalogue import Catalogue, lost, merged
from shared.registry.fleet import Fleet

_log = structlog.get_logger(__name__)


class Memory:
    """What one process remembers of the declarations."""

    def __init__(self, fleet: Fleet, known: Catalogue | None = None) -> None:
        self._fleet = fleet
        self.catalogue = known or Catalogue()
        """All that is worth keeping; replaced by each `refresh` that learns something."""

    async def refresh(self) -> list[str]:
        """Read what is declared and mend what is missing; return the models declared again.

        Raises the registry's errors; then nothing is forgotten, and the next call goes on.
        """
        # Deployments first: one that is being forgotten is then seen here or there, or twice.
        deployments = await self._fleet.deployments()
        forgotten = await self._fleet.forgotten()
        stored = Catalogue(deployments=dict(deployments), forgotten=dict(forgotten))
        loss = lost(stored, self.catalogue, {*deployments.corrupt, *forgotten.corrupt})
        self.catalogue = merged(stored, self.catalogue)
        for deployment in loss.bury:
            await self._fleet.bury(deployment)
        for model in loss.excess:
            await self._fleet.exhume(model)
        restored: list[str] = []
        for wish in loss.redeclare:
            model = wish.deployment.spec.name
            if await self._fleet.declare(model, wish.deployment, wish.expected):
                restored.append(model)
                _log.warning(
                    "declared_again",
                    model=model,
                    generation=wish.deployment.generation,
                    deleted=wish.deployment.deleted,
                )
        return restored
