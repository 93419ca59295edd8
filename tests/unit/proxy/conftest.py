"""Fixtures for the tests of the carrier."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from services.proxy.carrier import carrying, compiled
from services.proxy.carrier.carrying import Carrier


@pytest.fixture
async def carrier() -> AsyncGenerator[Carrier]:
    """Give a carrier of the test's loop."""
    compiled.build()
    made = carrying.make_carrier(asyncio.get_running_loop())
    assert made is not None
    yield made
    made.close()
