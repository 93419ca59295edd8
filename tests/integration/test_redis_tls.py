"""Redis over TLS: only a server that can be verified, and rotation while the mesh serves."""

import asyncio
import ssl
from collections.abc import Generator
from pathlib import Path
from typing import Final

import pytest

from shared.errors import RegistryUnavailableError
from shared.registry import open_registry
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.certificates import Authority
from tests.support.mesh import sim_model, start, write_models
from tests.support.redis_topologies import Server
from tests.support.redis_trial import under_load
from tests.support.servers import free_port

MODEL: Final = "sim"
BACK_BOUND_S: Final = 2.0
"""From the end of all connections until every proxy reserves over new ones."""


class Guarded(Server):
    """A server with a password and a certificate; tests command it on a port without TLS."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder / "certificates")
        self.tls_port = free_port()
        made = self.authority.sign()
        super().__init__(
            folder,
            *("--tls-port", str(self.tls_port), "--tls-auth-clients", "no"),
            *("--tls-cert-file", str(made.certificate), "--tls-key-file", str(made.key)),
            *("--tls-ca-cert-file", str(self.authority.certificate)),
            password="first-password",
        )

    def url_for(self, *, trusts: Path | None) -> str:
        """Give the URL over TLS, for a client that trusts an authority; None: only the system's."""
        query = f"?ssl_ca_certs={trusts}" if trusts else ""
        return f"rediss://:{self.password}@127.0.0.1:{self.tls_port}/0{query}"

    def shown(self) -> str:
        """Give the certificate that it shows to whoever connects now."""
        return ssl.get_server_certificate(
            ("127.0.0.1", self.tls_port), ca_certs=str(self.authority.certificate)
        )

    def rotate(self, password: str) -> None:
        """Show another certificate to new connections, and want another password."""
        made = self.authority.sign()
        self.command(
            *("CONFIG", "SET", "tls-cert-file", str(made.certificate)),
            *("tls-key-file", str(made.key), "requirepass", password),
        )
        self.password = password


@pytest.fixture
def guarded(tmp_path: Path) -> Generator[Guarded]:
    """Run a server with TLS."""
    server = Guarded(tmp_path / "redis")
    yield server
    server.kill()


async def test_only_a_server_that_can_be_verified_is_talked_to(
    guarded: Guarded, tmp_path: Path
) -> None:
    """With its authority all works, hints too; with none or another one it is not talked to."""
    trusting = CommonSettings(
        redis_url=Secret(guarded.url_for(trusts=guarded.authority.certificate))
    )
    registry = await open_registry(trusting)
    assert (await registry.ledger.beat(MODEL, "px")).leases == 0
    async for hint in registry.routes.hints():
        assert hint
        break
    await registry.aclose()
    other = await asyncio.to_thread(Authority, tmp_path / "other")
    for trusts in (None, other.certificate):
        with pytest.raises(RegistryUnavailableError, match=r"(?i)certificate.*REDMESH_REDIS_URL"):
            await open_registry(CommonSettings(redis_url=Secret(guarded.url_for(trusts=trusts))))


@pytest.mark.mesh
@pytest.mark.timeout(180)
async def test_certificate_and_password_are_rotated(guarded: Guarded, tmp_path: Path) -> None:
    """Both are replaced, then every connection ends: new ones are made, and no request notices."""
    file = tmp_path / "password"
    file.write_text(guarded.password)
    models = write_models(tmp_path / "models.json", sim_model(MODEL, replicas=2, step_ms=20))
    env = {
        "REDMESH_REDIS_URL": guarded.url_for(trusts=guarded.authority.certificate),
        "REDMESH_REDIS_PASSWORD_FILE": str(file),
    }
    with start(models, env=env) as mesh:
        async with under_load(mesh, MODEL, "TLS, rotated") as trial:
            before = await asyncio.to_thread(guarded.shown)
            await asyncio.to_thread(guarded.rotate, "second-password")
            file.write_text("second-password\n")
            assert await asyncio.to_thread(guarded.shown) != before
            for kind in ("normal", "pubsub"):
                await asyncio.to_thread(guarded.command, "CLIENT", "KILL", "TYPE", kind)
            await trial.is_back()
            await trial.heals(ledger_bound_s=BACK_BOUND_S)
