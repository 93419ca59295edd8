"""Whether this machine can have hosts of its own, and the sweep of what a killed run left."""

import os

import pytest

from tests.support import netns


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skip where the kernel forbids network namespaces; in CI that is a failure."""
    reason = netns.why_not()
    if reason is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must be able to make network namespaces: {reason}")
        pytest.skip(reason)
    netns.sweep()
