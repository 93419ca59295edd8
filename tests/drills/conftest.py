"""One mesh for all drills of a file: it has to survive them all."""

from collections.abc import Generator

import pytest

from tests.support.mesh import Mesh, sim_model, start, write_models

MODEL = "sim"
REPLICAS = 3


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Generator[Mesh]:
    """Run two hosts, two proxies, two controllers and three replicas behind links."""
    models = write_models(
        tmp_path_factory.mktemp("models") / "models.json",
        sim_model(
            MODEL,
            replicas=REPLICAS,
            step_ms=30,
            routing={"max_requests_per_replica": 400, "inter_byte_timeout_s": 4},
        ),
    )
    with start(
        models, hosts=2, env={"REDMESH_DRILLS_ALLOWED": "true"}, options=("--links",)
    ) as running:
        yield running
