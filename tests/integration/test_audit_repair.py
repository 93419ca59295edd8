"""`redmesh audit` on a mesh under load: changes by hand are found, explained and repaired."""

import time
from collections.abc import Generator

import pytest

from shared.registry import Registry
from shared.registry.ledger import Reserve
from tests.support.mesh import Done, Mesh, sim_model, start, write_models
from tests.support.streams import Load
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mesh

MODEL = "audited"
USERS = 12


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Generator[Mesh]:
    """Run a mesh with two proxies and streams of a second."""
    models = write_models(
        tmp_path_factory.mktemp("audit") / "models.json",
        sim_model(MODEL, replicas=2, step_ms=40),
    )
    with start(models) as mesh:
        yield mesh


async def disturbed(running: Mesh, registry: Registry) -> Done:
    """Invent totals, and audit."""
    keys = registry.keys.model(MODEL)
    await registry.connection.command("HINCRBY", keys.nreq, "*", 1000)
    await registry.connection.command("HSET", keys.cost, "nobody", 5)
    return await running.ask("audit")


async def repaired(running: Mesh, registry: Registry) -> tuple[str, float]:
    """Delete all totals, repair, and say what that printed and how long it took."""
    keys = registry.keys.model(MODEL)
    await registry.connection.command("DEL", keys.cost, keys.nreq)
    began_s = time.monotonic()
    done = await running.ask("audit", "--repair")
    assert done.code == 0, done
    return done.out, time.monotonic() - began_s


async def test_wrong_totals_are_found_and_repaired_under_load(running: Mesh) -> None:
    """Deleted and invented totals are drift (exit 1, with advice); --repair ends it, at once."""
    async with running.registry() as registry:
        load = Load(running.ports, MODEL, max_tokens=25)
        async with load.users(USERS):
            await wait_until(lambda: load.good >= USERS, what="traffic flows")
            clean = await running.ask("audit")
            assert clean.code == 0, clean
            # Every 30 s a proxy works the totals out anew, and may be faster: not twice in a row.
            found = await disturbed(running, registry)
            if found.code == 0:
                found = await disturbed(running, registry)
            assert found.code == 1, found
            assert "requests" in found.out
            assert "audit --repair" in found.out
            told, took_s = await repaired(running, registry)
            if "worked out anew" not in told:
                told, took_s = await repaired(running, registry)
            assert "worked out anew" in told
            again = await running.ask("audit")
            assert again.code == 0, again
        report = load.report()
        print(f"\nrepaired and proven in {took_s:.1f} s\n{report}")  # noqa: T201 - for the reader
        assert (report.ok, report.retried) == (report.count, 0), str(report)

        async def empty() -> bool:
            books = await registry.ledger.books(MODEL, await registry.ledger.proxies(MODEL))
            return not (books.leases or books.requests or books.costs)

        await wait_until(empty, what="the ledger is empty")


async def test_what_a_vanished_proxy_holds_is_dropped(running: Mesh) -> None:
    """Reservations without a beat on record are named, and go, and nothing else does."""
    async with running.registry() as registry:
        await registry.ledger.batch(MODEL, "px-gone", [Reserve("q", 9, 0)])
        await running.ask("audit", "--repair")

        async def gone() -> bool:
            return not await registry.ledger.leases(MODEL, "px-gone")

        await wait_until(gone, timeout_s=15, what="its reservation was dropped")
        clean = await running.ask("audit")
        assert clean.code == 0, clean
