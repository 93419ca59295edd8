"""The work of one reign: shut out earlier leaders, then read, plan and act, again and again.

The order is what makes a takeover safe. A model's fence is raised before anything of that model is
read: whatever an earlier leader wrote before is seen, and whatever it sends later is refused.
Models that are declared during the reign are fenced and read again before they are planned for.
"""

from collections.abc import Set as AbstractSet

from services.controller.act import Actor
from services.controller.actions import Action
from services.controller.draft import tell
from services.controller.leader import Reign
from services.controller.metrics import Metrics
from services.controller.notices import ForeignContent, notice
from services.controller.observe import observe
from services.controller.plan import plan
from services.controller.probing import Prober
from services.controller.world import World
from shared.clock import Clock
from shared.ids import is_name
from shared.registry import Registry


class Term:
    """What one controller does in one reign. Lives as long as the reign."""

    def __init__(
        self,
        reign: Reign,
        registry: Registry,
        prober: Prober,
        clock: Clock,
        metrics: Metrics,
        actor: Actor,
    ) -> None:
        self.reign = reign
        self.actor = actor
        self.world: World | None = None
        """The last reading."""
        self._registry = registry
        self._prober = prober
        self._clock = clock
        self._metrics = metrics
        self._fenced: set[str] = set()
        self._foreign = ForeignContent()

    async def begin(self, owner: str) -> None:
        """Shut out every earlier leader, and tell who leads now."""
        await self._fence(await self._declared())
        message = f"leads with epoch {self.reign.epoch}"
        await self.actor.tell(tell("LeaderElected", f"controller/{owner}", message))

    async def decide(self, *, settled: bool) -> list[Action]:
        """Read the fleet, tell what changed in it, and plan."""
        started_s = self._clock.monotonic_s()
        world = await observe(self._registry, self._prober, settled=settled)
        while fresh := world.models.keys() - self._fenced:
            await self._fence(fresh)
            world = await observe(self._registry, self._prober, settled=settled)
        observed_s = self._clock.monotonic_s()
        actions = plan(world)
        self._metrics.observe_s.observe(observed_s - started_s)
        self._metrics.plan_s.observe(self._clock.monotonic_s() - observed_s)
        self._metrics.show(world)
        before, self.world = self.world, world
        for event in (*self._foreign.notice(world), *notice(before, world)):
            await self.actor.tell(event)
        return actions

    async def step(self, *, settled: bool) -> None:
        """Read, plan and act once.

        Raises LeadershipLostError as soon as the reign is over, and the registry's errors.
        """
        await self.actor.carry_out(await self.decide(settled=settled))

    async def _declared(self) -> set[str]:
        found = await self._registry.fleet.deployments()
        # One that does not parse now may be mended later; until then nobody may write to it.
        return {*found, *filter(is_name, found.corrupt)}

    async def _fence(self, models: AbstractSet[str]) -> None:
        await self.actor.raise_fences(sorted(models))
        self._fenced |= models
