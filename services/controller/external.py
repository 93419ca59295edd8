"""External deployments: one replica for each URL, looked after by any agent that lives. Pure.

The servers run already, so nothing is ever lost by looking after one from two places: a URL's
successor is made first, and whoever else stands for that URL leaves once it is READY.
"""

from services.controller.draft import Draft, tell
from services.controller.scaling import assess_failures, create, may_create, must_go
from services.controller.world import ModelView
from shared.models.replica import Replica, ReplicaState


def serve_urls(draft: Draft, model: str, urls: tuple[str, ...]) -> None:
    """Give each of `urls` exactly one good replica, and retire all others."""
    view = draft.world.models[model]
    for replica in draft.living(model):
        if replica.url not in urls:
            _retire(draft, replica, "its URL is no longer declared")
    for url in urls:
        _serve_url(draft, view, url)


def _serve_url(draft: Draft, view: ModelView, url: str) -> None:
    spec = view.deployment.spec
    revision = spec.revision()
    standing = [r for r in draft.living(spec.name) if r.url == url]
    good = sorted((r for r in standing if _good(draft, r, revision)), key=_best_first)
    if not good:
        backoff = assess_failures(draft, spec.name, revision)
        if may_create(draft, view, backoff):
            create(draft, spec, url, f"looking after {url}")
        return
    if good[0].state is not ReplicaState.READY:
        return
    for replica in standing:
        if replica.rid != good[0].rid:
            _retire(draft, replica, f"{good[0].rid} looks after {url} now")


def _good(draft: Draft, replica: Replica, revision: str) -> bool:
    return not must_go(draft, replica, revision) and draft.world.agent_alive(replica.host)


def _best_first(replica: Replica) -> tuple[bool, int, str]:
    return replica.state is not ReplicaState.READY, replica.gen, replica.rid


def _retire(draft: Draft, replica: Replica, reason: str) -> None:
    if replica.state is not ReplicaState.PENDING:
        event = tell("ReplicaDraining", f"replica/{replica.rid}", reason)
        draft.move(replica, ReplicaState.DRAINING, reason, event)
